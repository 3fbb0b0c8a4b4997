"""The tags that delimit a language model's thinking, as in SmolLM3's and Qwen3's tokenizers."""

THINK, END_THINK = "<think>", "</think>"
