"""What ``llm-trm bench`` runs: workloads, candidates, the measuring protocol, tables and plots."""
