"""Checks for optional packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llm_trm.errors import InputError

_PLOTS = (".png", ".svg", ".pdf")


def require(extra: str, *packages: str) -> None:
    """Raise InputError unless all ``packages``, which ``extra`` installs, are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'this needs {" and ".join(missing)}: pip install "llm-trm[{extra}]"')


def require_plot(path: Path) -> None:
    """Raise InputError unless matplotlib is installed and can write a file of this name."""
    if path.suffix.lower() not in _PLOTS:
        raise InputError(f"--plot {path}: name a file that ends in {', '.join(_PLOTS)}")
    require("plot", "matplotlib")
