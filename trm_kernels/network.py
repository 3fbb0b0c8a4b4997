"""Drop-in modules with the reference's parameters and function, run by the fastest suitable backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from trm_kernels import backends, reference
from trm_kernels.backends import checks
from trm_kernels.config import NetworkConfig
from trm_kernels.module import FusedModule


class DispatchingModule(FusedModule):
    """Base class of modules that run on the fastest suitable backend."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the module.

        Args:
            x: Input [B, L, D].
            mask: 1 at valid positions, 0 at padding [B, L], of any dtype and pattern (not an additive mask).
                Padding is not attended to and its output is zero. Its input must be finite.

        Returns:
            Output [B, L, D].

        Raises:
            ValueError: If the shapes do not match the network.
            BackendError: If a backend was requested by name and cannot handle this call.
        """
        self.check(x, mask)
        return backends.run(self, x, mask)

    def selected_backend(self, x: Tensor, mask: Tensor | None = None) -> backends.Selection:
        """Return the backend that ``self(x, mask)`` runs on, and why others were skipped."""
        self.check(x, mask)
        return backends.select(self, x, mask)


class TinyRecursiveNetwork(DispatchingModule, reference.TinyRecursiveNetwork):  # type: ignore[misc]
    """A stack of transformer blocks: the ``net`` that a Tiny Recursive Model applies repeatedly.

    It has the parameter names and shapes of the eager model it replaces, so state dicts load in both
    directions with ``strict=True``. The members of ``layers`` are plain eager blocks; call the network
    instead of its layers.

    Args:
        d_model: Width D of the residual stream.
        n_layers: Number of blocks.
        n_heads: Number of attention heads; ``d_model`` must be a multiple of it.
        dropout: Probability of dropping an attention weight in training.
        backend: ``"auto"``, ``"eager"``, ``"compile"``, ``"triton"`` or ``"native"``. None uses the setting
            of :func:`~trm_kernels.backends.use_backend` or ``TRM_BACKEND``.
        **options: Other fields of :class:`~trm_kernels.config.NetworkConfig`: ``family``, ``mixer``,
            ``seq_len``, ``rope``, ``rope_theta``.

    Example:
        >>> net = TinyRecursiveNetwork(256)
        >>> net(torch.randn(2, 16, 256)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(
        self,
        d_model: int,
        n_layers: int = 2,
        n_heads: int = 8,
        dropout: float = 0.0,
        *,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(NetworkConfig(d_model, n_layers, n_heads, dropout, **options))
        self.backend = None if backend is None else backends.validate_name(backend)

    @classmethod
    def from_config(cls, config: NetworkConfig, *, backend: str | None = None) -> Self:
        """Build a network from its configuration."""
        options = {name: getattr(config, name) for name in config.__dataclass_fields__}
        return cls(**options, backend=backend)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def forward_eager(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return reference.TinyRecursiveNetwork.forward(self, x, mask)


class TransformerBlock(DispatchingModule, reference.TransformerBlock):
    """A single block, with the parameter names it has inside a network.

    Args:
        d_model: Width D of the residual stream.
        n_heads: Number of attention heads.
        dropout: Probability of dropping an attention weight in training.
        backend, **options: As for :class:`TinyRecursiveNetwork`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 8,
        dropout: float = 0.0,
        *,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(NetworkConfig(d_model, 1, n_heads, dropout, **options))
        self.backend = None if backend is None else backends.validate_name(backend)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [self]

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, *, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Apply the block. ``key_padding_mask`` [B, L] is the inverse of ``mask`` (True = padding)."""
        if key_padding_mask is not None:
            if mask is not None:
                raise ValueError("pass mask or key_padding_mask, not both")
            mask = key_padding_mask == 0
        return super().forward(x, mask)

    def forward_eager(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return reference.TransformerBlock.forward(self, x, None if mask is None else mask != 0)


checks.KNOWN.add(TransformerBlock)
