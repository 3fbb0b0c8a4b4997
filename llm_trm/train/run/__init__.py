"""What every run has: checkpoints, state, schedule, tracking."""
