"""The interface between modules and the backends that run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trm_kernels.config import NetworkConfig
from trm_kernels.prepared import Freezable

#: Methods that define what a module computes. Kernels read parameters and never call these methods.
_FUNCTION = ("__call__", "forward", "forward_eager", "blocks")


def _is_foreign(kind: type, name: str) -> bool:
    """Whether the class that defines this method belongs neither to this package nor to torch."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return owner.__module__.partition(".")[0] not in ("trm_kernels", "torch")


class FusedModule(Freezable):
    """Base class of the drop-in modules: a configuration, blocks, and the reference's forward."""

    config: NetworkConfig
    backend: str | None
    #: Methods of ``_FUNCTION`` that a class outside this package overrides.
    overridden: frozenset[str] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Computed here rather than in each call, so that torch.compile reads a constant.
        cls.overridden = frozenset(name for name in _FUNCTION if _is_foreign(cls, name))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that a call applies, in order."""
        raise NotImplementedError

    def forward_eager(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the reference, regardless of the selected backend. ``mask`` is [B, L] or None."""
        raise NotImplementedError

    def check(self, x: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError if the shapes do not match this module."""
        config = self.config
        if x.dim() != 3 or x.shape[-1] != config.d_model:
            raise ValueError(f"expected an input [B, L, {config.d_model}], got {list(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError("the sequence is empty: L must be at least 1")
        if config.mixer == "tokens":
            if x.shape[1] != config.seq_len:
                raise ValueError(f"this token mixer needs L = {config.seq_len}, got {x.shape[1]}")
            if mask is not None:
                raise ValueError("a token mixer mixes every position and accepts no mask")
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"expected a mask {list(x.shape[:2])}, got {list(mask.shape)}")

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend!r}"
