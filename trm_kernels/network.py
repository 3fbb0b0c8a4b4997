"""Drop-in modules: the reference's parameters and function, run by the fastest backend that serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from trm_kernels import backends, prepared, reference
from trm_kernels.config import NetworkConfig

#: Methods that say what a module computes. Kernels read parameters and would never call them.
_FUNCTION = ("__call__", "forward", "forward_eager", "blocks")


def _is_foreign(kind: type, name: str) -> bool:
    """Whether the method of this name comes from a class that is neither this package's nor torch's."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return owner.__module__.partition(".")[0] not in ("trm_kernels", "torch")


class FusedModule(nn.Module):
    """What the drop-in modules share: checks of the input, and the choice of a backend."""

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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the module.

        Args:
            x: Input [B, L, D].
            mask: 1 at valid positions, 0 at padding [B, L], any dtype and any pattern (not an additive
                mask). Padding is not attended to, and comes out as zeros; it must be finite.

        Returns:
            Output [B, L, D].

        Raises:
            ValueError: Shapes that do not fit the network.
            BackendError: The backend that was asked for by name cannot serve this call.
        """
        self.check(x, mask)
        return backends.run(self, x, mask)

    def selected_backend(self, x: Tensor, mask: Tensor | None = None) -> backends.Selection:
        """The backend that ``self(x, mask)`` runs on, and why others were passed over."""
        self.check(x, mask)
        return backends.select(self, x, mask)

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

    # Each of these may come with other weights.
    def train(self, mode: bool = True) -> Self:
        """See :meth:`torch.nn.Module.train`; raises FrozenError inside :func:`~trm_kernels.frozen`."""
        if mode:
            prepared.refuse(self, "train()")
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # .to(), .half(), .cuda(), share_memory()
        prepared.refuse(self, "moving or casting it")
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        prepared.refuse(self, "load_state_dict()")
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend!r}"


class TinyRecursiveNetwork(FusedModule, reference.TinyRecursiveNetwork):  # type: ignore[misc]
    """A stack of transformer blocks, the ``net`` that a Tiny Recursive Model applies again and again.

    Parameter names and shapes are those of the eager model it replaces, so state dicts load both ways
    with ``strict=True``. The members of ``layers`` are plain eager blocks: call the network.

    Args:
        d_model: Width D of the residual stream.
        n_layers: Number of blocks.
        n_heads: Attention heads; ``d_model`` must be a multiple of it.
        dropout: Probability of dropping an attention weight in training.
        backend: ``"auto"``, ``"eager"``, ``"compile"``, ``"triton"`` or ``"native"``; None follows
            :func:`~trm_kernels.backends.use_backend` and ``TRM_BACKEND``.
        **options: Further fields of :class:`~trm_kernels.config.NetworkConfig`: ``family``, ``mixer``,
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
        """Build a network from its description."""
        options = {name: getattr(config, name) for name in config.__dataclass_fields__}
        return cls(**options, backend=backend)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def forward_eager(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return reference.TinyRecursiveNetwork.forward(self, x, mask)


class TransformerBlock(FusedModule, reference.TransformerBlock):
    """One block on its own, with the parameter names it has inside a network.

    Args:
        d_model: Width D of the residual stream.
        n_heads: Attention heads.
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
        """Apply the block; ``key_padding_mask`` [B, L] is the inverse of ``mask`` (True = padding)."""
        if key_padding_mask is not None:
            if mask is not None:
                raise ValueError("give mask or key_padding_mask, not both")
            mask = key_padding_mask == 0
        return super().forward(x, mask)

    def forward_eager(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return reference.TransformerBlock.forward(self, x, None if mask is None else mask != 0)
