"""Tools for a checkout: the GPU run, and the commands that generate the docs' tables and plots."""
