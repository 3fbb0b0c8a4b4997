"""Language models that think with a Tiny Recursive Model, and the ``llm-trm`` command."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # From the package's metadata: trm_kernels imports torch, which takes a second.
    if name == "__version__":
        from importlib.metadata import version

        return version("llm-trm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
