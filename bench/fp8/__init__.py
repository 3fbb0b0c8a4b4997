"""Measures the accuracy of recursions in fp8 on a small task: ``python -m bench.fp8``."""
