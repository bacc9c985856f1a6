"""A page that shows what finished runs measured: one HTML file that needs nothing else, and its figures as PNG.

`command` is the command line's, `images` and `graphs` the sections for runs of either kind, `measure` what they need
beyond the runs' summary.json, `html` the frame, `published` the paper's curves.
"""
