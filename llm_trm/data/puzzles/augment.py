"""Random symmetries of puzzles, sampled for every batch on its device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_trm.data.puzzles.dataset import PuzzleInfo
from llm_trm.data.puzzles.sudoku import SHAPES, TOKEN_OFFSET, Shape, line_orders
from llm_trm.errors import InputError

Augmentation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: The token of the digit 1.
_FIRST_DIGIT = 1 + TOKEN_OFFSET


def augmentation(info: PuzzleInfo) -> Augmentation | None:
    """A function that applies a random symmetry to every puzzle of a batch; None for tasks without one.

    The function takes inputs and labels [B, L], of any integer dtype and on any device, and returns new
    tensors of the same dtypes. It applies the same symmetry to the inputs and labels of a puzzle, sampled
    uniformly with the device's default generator. Only the first call synchronises with the device, to copy
    small tables.

    Sudoku: permutations of digits, bands, rows within a band, stacks and columns within a stack, and
    transposition if boxes are square.
    Maze: rotations and reflections that keep the shape of the grid.
    ARC: none, because its puzzles are augmented when they are written.

    Raises:
        InputError: The grid is not a Sudoku.
    """
    if info.task == "sudoku":
        shape = SHAPES.get(info.rows)
        if shape is None or info.columns != info.rows or info.vocab_size != shape.vocab_size:
            raise InputError(
                f"puzzles of {info.rows} x {info.columns} cells and {info.vocab_size} tokens are not "
                "Sudokus: create Sudokus with `llm-trm data sudoku`"
            )
        return _SudokuSymmetries(shape)
    if info.task == "maze":
        return _GridSymmetries(info.rows, info.columns)
    return None


class _SudokuSymmetries:
    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        rows = torch.from_numpy(line_orders(shape.size, shape.box_rows)) * shape.size
        columns = torch.from_numpy(line_orders(shape.size, shape.box_columns))
        self._tables = _Tables(rows, columns, torch.arange(_FIRST_DIGIT))

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        batch, size = len(inputs), self._shape.size
        row_orders, column_orders, kept = self._tables.on(inputs.device)
        rows = _drawn(row_orders, batch)
        columns = _drawn(column_orders, batch)
        cells = rows[:, :, None] + columns[:, None, :]
        if self._shape.square_boxes:
            transposed = torch.randint(2, (batch, 1, 1), device=inputs.device, dtype=torch.bool)
            cells = torch.where(transposed, cells.mT, cells)
        cells = cells.flatten(1)
        digits = torch.rand(batch, size, device=inputs.device).argsort(1) + _FIRST_DIGIT
        tokens = torch.cat([kept.expand(batch, -1), digits], 1)
        return _relabelled(inputs, cells, tokens), _relabelled(labels, cells, tokens)


class _GridSymmetries:
    def __init__(self, rows: int, columns: int) -> None:
        grid = torch.arange(rows * columns).view(rows, columns)
        turned = [grid.rot90(turns) for turns in range(4)]
        images = [
            image for grid in turned for image in (grid, grid.flip(1)) if image.shape == (rows, columns)
        ]
        self._tables = _Tables(torch.stack(images).flatten(1))

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        (images,) = self._tables.on(inputs.device)
        cells = _drawn(images, len(inputs))
        return inputs.gather(1, cells), labels.gather(1, cells)


class _Tables:
    """Constant tensors, copied to each device on first use."""

    def __init__(self, *tables: Tensor) -> None:
        self._tables = tables
        self._copies: dict[torch.device, tuple[Tensor, ...]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._copies:
            self._copies[device] = tuple(table.to(device) for table in self._tables)
        return self._copies[device]


def _drawn(table: Tensor, batch: int) -> Tensor:
    """Random rows of ``table``, [batch, columns]."""
    return table[torch.randint(len(table), (batch,), device=table.device)]


def _relabelled(tokens: Tensor, cells: Tensor, labels: Tensor) -> Tensor:
    """labels[b, tokens[b, cells[b, l]]], in the dtype of ``tokens``."""
    return labels.gather(1, tokens.gather(1, cells).long()).to(tokens.dtype)
