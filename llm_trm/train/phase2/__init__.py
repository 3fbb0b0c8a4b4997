"""A recursion from the states before thinking to those behind it: ``llm-trm train phase2``."""
