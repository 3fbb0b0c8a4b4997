"""The language model and the recursion, trained together on questions and answers: ``llm-trm train lora``."""
