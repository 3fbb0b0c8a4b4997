"""The recursion of a Tiny Recursive Model over any network (arXiv 2510.04871, figure 3)."""

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
    """Compute ``z = net(x + y + z)`` n times, then ``y = net(y + z)``.

    If ``net`` is a network of this package and runs on the ``triton`` or ``native`` backend, the recursion is
    one chain of kernels with one autograd node. With a mask, the valid positions are packed, so padding costs
    nothing. The ``eager`` and ``compile`` backends also pack if they can read the lengths without
    synchronising with a device: from a mask on the CPU, or from a Packing with ``lengths``. Otherwise, and
    under an outer torch.compile, which would recompile for other lengths, they run on the padded batch.

    Args:
        net: The tiny network, called as ``net(h)``, or as ``net(h, mask=mask)`` if there is a mask.
        x: Embedded question [B, L, D].
        y: Current answer [B, L, D].
        z: Current latent state [B, L, D].
        n: Number of latent steps; 0 only refines the answer.
        mask: 1 at valid positions [B, L]; the output is zero at all other positions. A
            :class:`~trm_kernels.Packing` built with known lengths or a known number of rows also saves the
            memory of the padding.
        output_norm: Applied after every call of the network (``SequenceTRM`` of anonx3247/llm-trm).
        memory: What is saved for the backward. ``"fast"``: everything it reads. ``"balanced"``: everything
            except the MLP pre-activations, which one GEMM per block recomputes. ``"small"``: only the input
            of every network call; the backward recomputes the rest. ``native`` saves everything with
            ``"balanced"`` too. The other backends save what autograd saves, and checkpoint every call with
            ``"small"``.
        precision: ``"fp8-nograd"`` runs the matrix products in fp8 (e4m3, one scale per row of activations
            and weights) in recursions that record no gradient: all of them in inference, T - 1 of T in
            training. Requires the ``triton`` backend on compute capability 9.0 or newer.
        read: Positions of the new y to return, int64 [B, K]; y then has shape [B, K, D]. Without gradients,
            the ``triton`` backend computes only these positions after the last mixer.

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
    """Run T - 1 latent recursions without gradients, then one that records them.

    The other arguments are those of :func:`latent_recursion`. Detach the result before the next supervision
    step.

    Args:
        T: Number of latent recursions, at least 1.
        with_gradients: Whether the last recursion records gradients.

    Returns:
        The new ``(y, z)``.

    Raises:
        BackendError: If a backend or precision was requested by name and cannot handle the call.
    """
    for name, count in (("n", n), ("T", T)):
        # A subset of arguments.integer: callers may compile this function, with n and T as symbols.
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
    request = Recursion(n, T, mask, output_norm, with_gradients, memory, precision, read)
    valid = request.valid
    stepwise: str | None = f"{type(net).__name__} is not a network of this package"
    if isinstance(net, FusedModule):
        states = _states(x, y, z)
        net.check(states[1], valid)
        run, stepwise = _own_recursion(net, states, request)
        if run is not None:
            return run(net, states, request)
    if precision is not None:
        raise backends.BackendError(f"precision={precision!r} cannot handle this call: {stepwise}")

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
    """Expand x, y and z to the shape and dtype of their sum."""
    dtype = states[0].dtype
    for state in states[1:]:
        dtype = torch.promote_types(dtype, state.dtype)
    return tuple(state.to(dtype) for state in torch.broadcast_tensors(*states))


def _own_recursion(
    net: FusedModule, states: tuple[Tensor, ...], request: Recursion
) -> tuple[RunRecursion | None, str | None]:
    """Return the recursion of the backend of ``net``, or None and why ``net`` is called step by step."""
    backend = backends.BACKENDS[backends.select(net, states[1], request.valid).name]
    if backend.recursion is None:
        reason: str | None = f"backend {backend.name!r} has no recursion of its own"
    else:
        reason = backend.recursion.refuses(net, states, request)
        if reason is None:
            return backend.recursion.run, None
    if backend.packed is not None and request.mask is not None and request.precision is None:
        reason = backend.packed.refuses(net, states, request)
        if reason is None:
            return backend.packed.run, None
    return None, reason


class RecursionMixin:
    """Adds the two recursions as methods to a model that owns ``net``.

    The model sets ``net``, ``n_latent_steps`` (n) and ``n_deep_recursions`` (T), and optionally
    ``output_norm``.
    """

    net: nn.Module
    n_latent_steps: int
    n_deep_recursions: int

    # Not a class attribute output_norm: it would hide a submodule of that name, because nn.Module stores
    # submodules outside the instance's __dict__.
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
