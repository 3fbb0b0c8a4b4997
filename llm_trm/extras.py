"""Checks for optional packages."""

from __future__ import annotations

import importlib.util

from llm_trm.errors import InputError


def require(extra: str, *packages: str) -> None:
    """Raise InputError unless all ``packages``, which ``extra`` installs, are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'this needs {" and ".join(missing)}: pip install "llm-trm[{extra}]"')
