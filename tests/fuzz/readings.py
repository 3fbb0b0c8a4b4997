"""Functions that read a file or a folder of the world; each returns all that it read."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def puzzles(path: Path) -> Any:
    from llm_trm.data.puzzles.dataset import read_info, read_split

    return read_info(path), read_split(path, "train"), read_split(path, "test")


def arc(path: Path) -> Any:
    from llm_trm.data.puzzles.arc_folder import read_arc

    return puzzles(path), read_arc(path)


def pairs(path: Path) -> Any:
    from llm_trm.data.pairs import open_pairs

    found = open_pairs(path)
    return found, list(found.shards()), list(found.records())


def compressor(path: Path) -> Any:
    from llm_trm.models.compression import load_compressor

    return load_compressor(path)


def phase2(path: Path) -> Any:
    from llm_trm.models.phase2 import load_phase2

    return load_phase2(path)


def puzzle_model(path: Path) -> Any:
    from llm_trm.models.puzzle.loading import load_puzzle

    return load_puzzle(path)


def latent_model(path: Path) -> Any:
    from llm_trm.models.causal.loading import load_latent_model

    found = load_latent_model(path)
    return found.model, found.facts, found.prompt_form


def language_model(path: Path) -> Any:
    from llm_trm.models.loading import load_thinking_model

    return load_thinking_model(str(path)).model


def official(path: Path) -> Any:
    from llm_trm.models.puzzle.official import read_official

    return read_official(
        path, grid=(4, 4), task="sudoku", heads=2, positions="none", puzzle_len=0, n_latent_steps=1,
        n_deep_recursions=1, max_steps=2, dtype="float32", seq_len=16,
    )  # fmt: skip


def questions(path: Path) -> Any:
    from llm_trm.data.problems import load_questions, read_questions
    from llm_trm.data.questions import load_solved

    return list(read_questions(path)), load_questions(str(path), 9), load_solved(str(path))


def sudoku(path: Path) -> Any:
    from llm_trm.data.puzzles.sudoku_files import read_sudoku_file

    return read_sudoku_file(path)


def mazes(path: Path) -> Any:
    from llm_trm.data.puzzles.maze_files import read_mazes

    return list(read_mazes(path))


def puzzle_text(path: Path) -> Any:
    from llm_trm.cli.text_input import read_input
    from llm_trm.evaluate.questions import read_questions

    return read_questions(*read_input(path, "puzzles"))


def tasks(path: Path) -> Any:
    from llm_trm.data.puzzles.arc_files import read_tasks

    return read_tasks(path)


def config(path: Path) -> Any:
    from llm_trm.cli.options.settings import read_config

    return read_config(path)


def results(path: Path) -> Any:
    from llm_trm.benchmark.results import CaseResult, read

    return [CaseResult.from_json(line) for line in read(path)]


def checkpoints(path: Path) -> Any:
    from llm_trm.train.run.checkpoints import Checkpoints

    found = Checkpoints(path)
    return found.last.name, found.best


def tiles(path: Path) -> Any:
    from llm_trm.errors import InputError
    from trm_kernels.ops import dispatch
    from trm_kernels.ops._launch import TARGETS

    try:
        return dispatch.read(path, TARGETS["sm_90"])
    except dispatch.TableError as error:
        raise InputError(str(error)) from error


def write_tiles(path: str) -> None:
    """Write a table of tiles with one entry."""
    import torch

    from trm_kernels.ops import dispatch
    from trm_kernels.ops._launch import TARGETS
    from trm_kernels.ops.tiles import Activation, Choice, Problem, Tile

    problem = Problem("gemm", 256, 768, 256, 1, Activation.NONE, torch.bfloat16, False)
    entry = dispatch.Entry(Choice("triton", Tile(32, 64, 64, 4, 2)), 0.01, 0.02, problem, "x", "3.6.0")
    table = dispatch.Table({"name": TARGETS["sm_90"].name}, {"time": "2026-01-01"})
    table.entries[dispatch.key(problem)] = entry
    table.write(Path(path))
