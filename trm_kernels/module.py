"""A module that backends run: what they may read of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trm_kernels.config import NetworkConfig
from trm_kernels.prepared import Freezable

#: Methods that say what a module computes. Kernels read parameters and would never call them.
_FUNCTION = ("__call__", "forward", "forward_eager", "blocks")


def _is_foreign(kind: type, name: str) -> bool:
    """Whether the method of this name comes from a class that is neither this package's nor torch's."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return owner.__module__.partition(".")[0] not in ("trm_kernels", "torch")


class FusedModule(Freezable):
    """What backends know of the drop-in modules: a description, blocks, and the reference's function."""

    config: NetworkConfig
    backend: str | None
    #: Methods that say what it computes, and that a class outside of this package has replaced.
    overridden: frozenset[str] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Here rather than in each call: torch.compile reads it as a constant.
        cls.overridden = frozenset(name for name in _FUNCTION if _is_foreign(cls, name))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that a call applies, in order."""
        raise NotImplementedError

    def forward_eager(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute as the reference does, whatever backend is chosen. ``mask``: [B, L] or None."""
        raise NotImplementedError

    def check(self, x: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for shapes that do not fit this module."""
        config = self.config
        if x.dim() != 3 or x.shape[-1] != config.d_model:
            raise ValueError(f"expected an input [B, L, {config.d_model}], got {list(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError("the sequence is empty: L must be at least 1")
        if config.mixer == "tokens":
            if x.shape[1] != config.seq_len:
                raise ValueError(f"this token mixer takes L = {config.seq_len}, got {x.shape[1]}")
            if mask is not None:
                raise ValueError("a token mixer mixes every position and takes no mask")
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"expected a mask {list(x.shape[:2])}, got {list(mask.shape)}")

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend!r}"
