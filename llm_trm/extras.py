"""Optional packages, and what installs them."""

from __future__ import annotations

import importlib.util

from llm_trm.errors import InputError


def require(extra: str, *packages: str) -> None:
    """Raise InputError unless every package of ``packages`` is installed; ``extra`` brings them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'this needs {" and ".join(missing)}: pip install "llm-trm[{extra}]"')
