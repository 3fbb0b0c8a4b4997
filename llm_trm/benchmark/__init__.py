"""The implementation of ``llm-trm bench``: workloads, candidates, timing protocol, tables and plots."""
