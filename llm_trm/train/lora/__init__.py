"""Trains a language model and a recursion together, on questions and answers: ``llm-trm train lora``."""
