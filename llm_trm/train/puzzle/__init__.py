"""A recursion on Sudoku, mazes or ARC: ``llm-trm train puzzle``."""
