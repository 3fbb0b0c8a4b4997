"""Puzzles, their data folders, and their symmetries."""
