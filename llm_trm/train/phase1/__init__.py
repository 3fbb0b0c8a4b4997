"""A compressor of hidden states: ``llm-trm train phase1``."""
