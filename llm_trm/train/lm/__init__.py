"""Trains a tiny language model on the arithmetic world: ``llm-trm train lm``."""
