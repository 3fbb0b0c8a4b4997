"""Writes animations of a model solving a puzzle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llm_trm.data.puzzles.maze import GOAL, OPEN, PATH, START, WALL
from llm_trm.data.puzzles.sudoku import TOKEN_OFFSET
from llm_trm.evaluate.questions import Question
from llm_trm.evaluate.solving import Attempt
from llm_trm.extras import require
from llm_trm.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

#: Sizes in pixels.
_SIDE, _MARGIN, _CAPTION = 432, 16, 16
_LAST_FRAME_SECONDS = 2.5

_WHITE, _BLACK, _GREY, _BLUE = "#ffffff", "#111111", "#b0b0b0", "#1f5fbf"
_CHANGED, _WRONG = "#ffe680", "#f4a6a6"
_MAZE = {WALL: "#404040", OPEN: _WHITE, START: "#2e9e4f", GOAL: "#1f5fbf", PATH: "#f0a030"}


def require_gif() -> None:
    """Raise InputError unless the packages for :func:`write_gif` are installed."""
    require("plot", "PIL", "matplotlib")


def write_gif(path: Path, question: Question, attempt: Attempt, seconds: float) -> None:
    """Write a looping animation with one frame for the question and one for each step of an attempt.

    Args:
        path: Output file, written atomically.
        seconds: Duration of a frame; the last frame lasts longer.

    Raises:
        InputError: Pillow or matplotlib (for its font) is not installed.
    """
    require_gif()
    drawing = _Drawing(question)
    frames = [drawing.frame(question.tokens, None, "the puzzle")]
    before = question.tokens
    for step in attempt.steps:
        caption = f"step {step.number}, halting confidence {step.confidence:.1%}"
        frames.append(drawing.frame(step.tokens, before, caption))
        before = step.tokens
    durations = [round(1000 * seconds)] * len(frames)
    durations[-1] = max(durations[-1], round(1000 * _LAST_FRAME_SECONDS))
    with replacing(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )


class _Drawing:
    """Draws frames of one puzzle."""

    def __init__(self, question: Question) -> None:
        from matplotlib import get_data_path
        from PIL import ImageFont

        self.question = question
        self.cell = max(4, _SIDE // max(question.rows, question.columns))
        # Pillow only has a scalable font since 10.1, and not in every build.
        fonts = Path(get_data_path()) / "fonts" / "ttf"
        self.digits = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), self.cell * 3 // 5)
        self.clues = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), self.cell * 3 // 5)
        self.words = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), _CAPTION)

    def frame(self, tokens: Tensor, before: Tensor | None, caption: str) -> Image:
        from PIL import Image, ImageDraw

        width, height = self.question.columns * self.cell, self.question.rows * self.cell
        # Even a narrow maze needs space for the caption.
        size = max(width, _SIDE) + 2 * _MARGIN, height + 3 * _MARGIN + _CAPTION
        image = Image.new("RGB", size, _WHITE)
        pencil = ImageDraw.Draw(image)
        for index, token in enumerate(tokens.tolist()):
            row, column = divmod(index, self.question.columns)
            changed = before is not None and token != int(before[index])
            left, top = _MARGIN + column * self.cell, _MARGIN + row * self.cell
            box = (left, top, left + self.cell, top + self.cell)
            given = int(self.question.tokens[index])
            if self.question.task == "sudoku":
                self._sudoku_cell(pencil, box, given, token, changed)
            else:
                wrong = token != given and (given != OPEN or token != PATH)
                pencil.rectangle(box, fill=_WRONG if wrong else _MAZE[token])
        if self.question.task == "sudoku":
            self._box_lines(pencil)
        pencil.text((_MARGIN, height + 2 * _MARGIN), caption, fill=_BLACK, font=self.words)
        return image

    def _sudoku_cell(
        self, pencil: ImageDraw, box: tuple[int, int, int, int], given: int, token: int, changed: bool
    ) -> None:
        is_clue = given > TOKEN_OFFSET
        fill = _WHITE
        if is_clue and token != given:
            fill = _WRONG
        elif changed:
            fill = _CHANGED
        pencil.rectangle(box, fill=fill, outline=_GREY)
        if token > TOKEN_OFFSET:
            middle: Any = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            pencil.text(
                middle,
                str(token - TOKEN_OFFSET),
                fill=_BLACK if is_clue else _BLUE,
                font=self.clues if is_clue else self.digits,
                anchor="mm",
            )

    def _box_lines(self, pencil: ImageDraw) -> None:
        shape = self.question.shape
        end = _MARGIN + shape.size * self.cell
        for line in range(shape.size + 1):
            offset = _MARGIN + line * self.cell
            if line % shape.box_rows == 0:
                pencil.line((_MARGIN, offset, end, offset), fill=_BLACK, width=3)
            if line % shape.box_columns == 0:
                pencil.line((offset, _MARGIN, offset, end), fill=_BLACK, width=3)
