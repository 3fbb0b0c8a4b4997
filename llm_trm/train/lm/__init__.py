"""A tiny language model of the arithmetic world: ``llm-trm train lm``."""
