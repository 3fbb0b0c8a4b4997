"""Shared by all trainings: settings, checkpoints, state, metrics, trackers, reports, interruption."""
