"""Draws puzzles with characters."""

from __future__ import annotations

from rich.text import Text
from torch import Tensor

from llm_trm.data.puzzles.maze import CHARSET, GOAL, OPEN, PATH, START, WALL
from llm_trm.data.puzzles.sudoku import TOKEN_OFFSET
from llm_trm.evaluate.questions import Question

_CHANGED = "black on yellow"
_WRONG = "bold white on red"
_CLUE = "bold"
#: Without colours, the characters alone distinguish the cells.
_MAZE_STYLES = {
    WALL: "grey50 on grey50",
    OPEN: "",
    START: "bold white on green",
    GOAL: "bold white on blue",
    PATH: "bold cyan",
}
#: Corners, crossings and edges of a grid, and its horizontal and vertical lines.
_LINES, _ASCII_LINES = ("┌┬┐", "├┼┤", "└┴┘", "─", "│"), ("+++", "+++", "+++", "-", "|")


def draw(question: Question, tokens: Tensor, before: Tensor | None = None, *, plain: bool = False) -> Text:
    """A question with its answer filled in.

    Clues are bold, cells that contradict them red, and cells that differ from ``before`` highlighted.

    Args:
        tokens: The answer [L]; the question's own tokens to draw only the clues.
        before: The answer of the previous step.
        plain: Use only ASCII, with one character per cell of a maze, as :func:`read_questions` reads it.
    """
    changed = [False] * len(tokens) if before is None else (tokens != before).tolist()
    draw_one = _sudoku if question.task == "sudoku" else _maze
    return draw_one(question, tokens.tolist(), changed, plain)


def _sudoku(question: Question, tokens: list[int], changed: list[bool], plain: bool) -> Text:
    shape = question.shape
    top, middle, bottom, line, bar = _ASCII_LINES if plain else _LINES
    edge = line * (2 * shape.box_columns + 1)

    def rule(ends: str) -> str:
        return ends[0] + ends[1].join([edge] * (shape.size // shape.box_columns)) + ends[2]

    text = Text(rule(top) + "\n", no_wrap=True)
    for row in range(shape.size):
        for column in range(shape.size):
            if column % shape.box_columns == 0:
                text.append(f"{bar} ")
            cell = row * shape.size + column
            text.append(
                _digit(tokens[cell]), _sudoku_style(int(question.tokens[cell]), tokens[cell], changed[cell])
            )
            text.append(" ")
        text.append(f"{bar}\n")
        if (row + 1) % shape.box_rows == 0 and row + 1 < shape.size:
            text.append(rule(middle) + "\n")
    text.append(rule(bottom))
    return text


def _digit(token: int) -> str:
    return str(token - TOKEN_OFFSET) if token > TOKEN_OFFSET else "."


def _sudoku_style(clue: int, token: int, changed: bool) -> str:
    if clue > TOKEN_OFFSET:
        return _CLUE if token == clue else _WRONG
    return _CHANGED if changed else "cyan"


def _maze(question: Question, tokens: list[int], changed: list[bool], plain: bool) -> Text:
    text = Text(no_wrap=True)
    for cell, token in enumerate(tokens):
        if cell and cell % question.columns == 0:
            text.append("\n")
        character = CHARSET[token - 1] if token else "?"
        # Characters on a terminal are about twice as high as wide.
        text.append(
            character if plain else 2 * character,
            _maze_style(int(question.tokens[cell]), token, changed[cell]),
        )
    return text


def _maze_style(given: int, token: int, changed: bool) -> str:
    if token != given and (given != OPEN or token != PATH):
        return _WRONG
    return _CHANGED if changed else _MAZE_STYLES[token]
