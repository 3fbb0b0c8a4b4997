"""A recursion that predicts the state after thinking: ``llm-trm train phase2``."""
