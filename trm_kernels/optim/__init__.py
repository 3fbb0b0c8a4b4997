"""Optimizers and parameter averages that CUDA graphs can capture."""
