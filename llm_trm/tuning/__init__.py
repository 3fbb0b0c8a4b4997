"""What ``llm-trm tune`` runs: which products a recursion asks for, candidates for each, and their times."""
