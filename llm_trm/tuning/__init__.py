"""The implementation of ``llm-trm tune``: records a recursion's products, and times candidates for each."""
