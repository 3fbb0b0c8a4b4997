"""The recursion of a Tiny Recursive Model, over any network (arXiv 2510.04871, figure 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from trm_kernels import backends
from trm_kernels.backends.registry import Normalisation, Precision, Recursion, RunRecursion
from trm_kernels.backends.stepwise import step_by_step
from trm_kernels.config import Memory
from trm_kernels.module import FusedModule
from trm_kernels.packing import Packing, read_positions

Network = Callable[..., Tensor]


def latent_recursion(
    net: Network,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    n: int,
    *,
    mask: Tensor | Packing | None = None,
    output_norm: Normalisation | None = None,
    memory: Memory = "balanced",
    precision: Precision | None = None,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """n times ``z = net(x + y + z)``, then ``y = net(y + z)``.

    On the ``triton`` and ``native`` backends, and where ``net`` is a network of this package, the recursion
    is one chain of kernels with one autograd node; a mask then packs the valid positions, so that padding
    costs nothing. The ``eager`` and ``compile`` backends pack too where the lengths can be known without
    waiting for a device: from a mask on the CPU, or a Packing with ``lengths``. Elsewhere, and under an outer
    torch.compile, which would compile again for other lengths, they run on the padded batch.

    Args:
        net: The tiny network; called as ``net(h)``, or ``net(h, mask=mask)`` where there is a mask.
        x: Embedded question [B, L, D].
        y: Current answer [B, L, D].
        z: Current latent state [B, L, D].
        n: Number of latent steps; 0 refines the answer alone.
        mask: 1 at valid positions [B, L]; the others come out as zeros. A :class:`~trm_kernels.Packing` of
            them, with the lengths or the number of rows that the caller knows, also saves the memory of the
            others.
        output_norm: Applied after every call of the network (``SequenceTRM`` of anonx3247/llm-trm).
        memory: What is kept for the backward. ``"fast"``: all that it reads. ``"balanced"``: not the
            pre-activations of the MLPs, which one product a block computes again. ``"small"``: the input of
            every network call alone, the rest of the call is run again. ``native`` keeps all with
            ``"balanced"`` too. Other backends keep what autograd keeps, but for ``"small"``, where they
            checkpoint every call.
        precision: ``"fp8-nograd"`` runs the matrix products of recursions that record no gradient in fp8
            (e4m3, a scale for every row of the activations and of the weights): those of inference, and T - 1
            of T in training. Needs the ``triton`` backend on compute capability 9.0 or newer.
        read: Positions of the new y that are wanted, int64 [B, K]; y is then [B, K, D]. Without gradient the
            ``triton`` backend computes only them behind the last mixing of positions.

    Returns:
        The new ``(y, z)``.
    """
    return deep_recursion(
        net, x, y, z, n, 1, mask=mask, output_norm=output_norm, memory=memory, precision=precision, read=read
    )


def deep_recursion(
    net: Network,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    n: int,
    T: int,
    *,
    mask: Tensor | Packing | None = None,
    output_norm: Normalisation | None = None,
    with_gradients: bool = True,
    memory: Memory = "balanced",
    precision: Precision | None = None,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """T - 1 latent recursions without gradient, then one with (or without, if asked).

    Args:
        T: Number of latent recursions, at least 1.
        with_gradients: Whether the last recursion records gradients.

    The others are as for :func:`latent_recursion`. Detach the result before the next supervision step.

    Returns:
        The new ``(y, z)``.

    Raises:
        BackendError: A backend or precision that was asked for by name cannot serve the call.
    """
    for name, count in (("n", n), ("T", T)):
        # Not all that arguments.whole does: this is compiled with its callers, n and T symbols perhaps.
        if isinstance(count, (bool, float)):
            raise ValueError(f"{name} must be a whole number, not {count!r}")
    if n < 0:
        raise ValueError(f"n must be at least 0, not {n}")
    if T < 1:
        raise ValueError(f"T must be at least 1, not {T}")
    if memory not in get_args(Memory):
        raise ValueError(f"memory must be one of {get_args(Memory)}, not {memory!r}")
    if precision not in (None, *get_args(Precision)):
        raise ValueError(f"precision must be None or one of {get_args(Precision)}, not {precision!r}")
    asked = Recursion(n, T, mask, output_norm, with_gradients, memory, precision, read)
    valid = asked.valid
    stepwise: str | None = f"{type(net).__name__} is no network of this package"
    if isinstance(net, FusedModule):
        states = _states(x, y, z)
        net.check(states[1], valid)
        run, stepwise = _own_recursion(net, states, asked)
        if run is not None:
            return run(net, states, asked)
    if precision is not None:
        raise backends.BackendError(f"precision={precision!r} cannot serve this call: {stepwise}")

    def call(h: Tensor) -> Tensor:
        out = net(h) if valid is None else net(h, mask=valid)
        return out if output_norm is None else output_norm(out)

    with torch.no_grad():
        for _ in range(T - 1):
            y, z = step_by_step(call, x, y, z, n, memory)
    with torch.set_grad_enabled(with_gradients and torch.is_grad_enabled()):
        y, z = step_by_step(call, x, y, z, n, memory)
        return (y if read is None else read_positions(y, read)), z


def _states(*states: Tensor) -> tuple[Tensor, ...]:
    """x, y and z in one shape and dtype: those of their sum."""
    dtype = states[0].dtype
    for state in states[1:]:
        dtype = torch.promote_types(dtype, state.dtype)
    return tuple(state.to(dtype) for state in torch.broadcast_tensors(*states))


def _own_recursion(
    net: FusedModule, states: tuple[Tensor, ...], asked: Recursion
) -> tuple[RunRecursion | None, str | None]:
    """The recursion of the backend that serves ``net``, or None and why it is called step by step."""
    backend = backends.BACKENDS[backends.select(net, states[1], asked.valid).name]
    if backend.recursion is None:
        reason: str | None = f"backend {backend.name!r} has no recursion of its own"
    else:
        reason = backend.recursion.refuses(net, states, asked)
        if reason is None:
            return backend.recursion.run, None
    if backend.packed is not None and asked.mask is not None and asked.precision is None:
        reason = backend.packed.refuses(net, states, asked)
        if reason is None:
            return backend.packed.run, None
    return None, reason


class RecursionMixin:
    """Gives a model that owns ``net`` the two recursions as methods.

    The model sets ``net``, ``n_latent_steps`` (n) and ``n_deep_recursions`` (T), and may set
    ``output_norm``.
    """

    net: nn.Module
    n_latent_steps: int
    n_deep_recursions: int

    # No class attribute for output_norm: it would hide a submodule of that name, which nn.Module keeps
    # out of the instance's own attributes.
    @property
    def _output_norm(self) -> Callable[[Tensor], Tensor] | None:
        return getattr(self, "output_norm", None)

    def latent_recursion(
        self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`latent_recursion`."""
        return latent_recursion(
            self.net, x, y, z, self.n_latent_steps, mask=mask, output_norm=self._output_norm
        )

    def deep_recursion(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        with_gradients: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`deep_recursion`."""
        return deep_recursion(
            self.net,
            x,
            y,
            z,
            self.n_latent_steps,
            self.n_deep_recursions,
            mask=mask,
            output_norm=self._output_norm,
            with_gradients=with_gradients,
        )
