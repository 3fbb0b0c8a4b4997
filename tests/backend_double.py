"""Replacement of functions of a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trm_kernels.backends import BACKENDS


def alter(patch: pytest.MonkeyPatch, name: str, part: str | None = None, **functions: Any) -> None:
    """Replace fields of a backend's record, or of its part ``recursion`` or ``packed``."""
    backend = BACKENDS[name]
    if part is not None:
        functions = {part: replace(getattr(backend, part), **functions)}
    patch.setitem(BACKENDS, name, replace(backend, **functions))
