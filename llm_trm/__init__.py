"""Language models that think with a Tiny Recursive Model, and the ``llm-trm`` command."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # trm_kernels imports torch, which `llm-trm --help` does not need.
    if name == "__version__":
        from trm_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
