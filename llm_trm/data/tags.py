"""The tags between which a language model thinks, as in SmolLM3's and Qwen3's tokenizers."""

THINK, END_THINK = "<think>", "</think>"
