"""The application: trains the networks of `qpde` and reports how faithful they stay in few bits.

Run from a checkout: `python -m train --help`.
"""
