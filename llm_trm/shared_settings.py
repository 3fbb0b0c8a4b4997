"""Settings that many commands share. Imports no torch, so that help is quick."""

from __future__ import annotations

from typing import Any

from llm_trm.ranges import SHARE_ABOVE_ZERO
from llm_trm.settings import setting

#: Help of ``--overwrite``.
REPLACE_FILE = "Replace an output file that exists."
REPLACE_PUZZLES = "Replace the puzzles in --output, whatever their task. Other files there stay."


def device() -> Any:
    """``--device``."""
    return setting(
        "auto", "auto selects CUDA (or ROCm) if available, else Apple's MPS, else the CPU.", critical=False
    )


def trust_remote_code() -> Any:
    """``--trust-remote-code``."""
    return setting(
        False,
        "Run the Python files of the language model. They have all your permissions, so read them first.",
        critical=False,
    )


def top_p() -> Any:
    """``--top-p``."""
    return setting(
        1.0, "Sample from the most likely tokens that together have this probability.", SHARE_ABOVE_ZERO
    )


def overwrite(help: str = REPLACE_FILE) -> Any:
    """``--overwrite``."""
    return setting(False, help, action=True)


def overwrite_puzzles() -> Any:
    """``--overwrite`` of a command that writes a folder of puzzles."""
    return overwrite(REPLACE_PUZZLES)


def output_file(help: str, *options: str, was: tuple[str, ...] = ()) -> Any:
    """A file to write; by default ``-o`` and ``--output``."""
    names = options or ("-o", "--output")
    return setting(None, help, None, *names, was=was, metavar="FILE", critical=False, file="write")
