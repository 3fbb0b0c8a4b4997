"""What recursions in fp8 cost in accuracy, on networks trained on a small task: ``python -m bench.fp8``."""
