"""Trains the recursion alone, by the reward of its answers: ``llm-trm train phase3``."""
