"""Evaluates trained models on held-out problems."""
