"""Optimizers and averages that a CUDA graph can hold."""
