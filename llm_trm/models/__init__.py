"""Language models and the recursions that read their states."""
