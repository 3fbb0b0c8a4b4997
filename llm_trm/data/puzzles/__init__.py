"""Puzzles: what they are, the folders that hold them, and their symmetries."""
