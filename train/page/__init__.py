"""A page that shows what finished runs measured: one HTML file that needs nothing else."""
