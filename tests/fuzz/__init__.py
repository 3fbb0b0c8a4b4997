"""Fuzzers of the options, of the readers of files, and of changes of weights.

The tests run a small, fixed set of cases; ``python -m tests.fuzz --help`` describes long runs.
"""
