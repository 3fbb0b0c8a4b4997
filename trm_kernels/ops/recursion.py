"""A latent recursion, or one network call, as one autograd node: ``torch.ops.trm_kernels.recursion``."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from trm_kernels.config import Memory
from trm_kernels.first_order import first_order
from trm_kernels.ops._library import define
from trm_kernels.ops.attention_common import Samples, mask_ends
from trm_kernels.ops.chain import Saved, recursion_forward, saved_spec
from trm_kernels.ops.chain_backward import recursion_backward
from trm_kernels.ops.layouts import LAYOUTS, unpack, with_matrices
from trm_kernels.ops.stream import Norm
from trm_kernels.ops.sublayer import Call


class AuxiliaryTensors(NamedTuple):
    """Tensors of a call that need no gradient; each may be None.

    Attributes:
        mask: uint8 [B, L], 1 = valid, for samples that are not packed. If ``ends`` is None, it is computed.
        ends: See :func:`~trm_kernels.ops.attention_common.mask_ends`.
        starts, row_count: ``starts`` and ``count`` of packed samples
            (:class:`~trm_kernels.ops.attention_common.Samples`).
        cos, sin: RoPE tables [L, E/2]; [R, E/2] for packed samples.
        seed: Seed of the dropout, int64 [1].
        read: Rows of the new y to compute, int64 [N]; y is then [1, N, D]. Not for training.
    """

    mask: Tensor | None = None
    ends: Tensor | None = None
    starts: Tensor | None = None
    row_count: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    seed: Tensor | None = None
    read: Tensor | None = None


class Settings(NamedTuple):
    """Non-tensor arguments of a call.

    Attributes:
        layout: Name in :data:`~trm_kernels.ops.layouts.LAYOUTS`.
        n: Number of latent steps; 0 for a single call of the network.
        n_heads: Number of attention heads.
        batch, length: Number of samples, and the length of the longest.
        eps: Epsilon of the blocks' norms.
        output_eps: Epsilon of the norm after every network call; None for no norm.
        dropout: Probability of dropping an attention weight.
        operand: Dtype of the GEMM operands.
        memory: What a training step saves (:data:`~trm_kernels.config.Memory`).
        fp8: Whether the GEMMs run in fp8; only without gradients.
    """

    layout: str
    n: int
    n_heads: int
    batch: int
    length: int
    eps: float
    output_eps: float | None
    dropout: float
    operand: torch.dtype
    memory: Memory
    fp8: bool = False


_STATIC = len(AuxiliaryTensors._fields) + len(Settings._fields)


def _call(like: Tensor, output_weight: Tensor | None, tensors: AuxiliaryTensors, settings: Settings) -> Call:
    mask, ends = tensors.mask, tensors.ends
    if mask is not None:
        mask = mask.contiguous()
        ends = mask_ends(mask) if ends is None else ends
    norm = None
    if settings.output_eps is not None:
        norm = Norm(None if output_weight is None else output_weight.contiguous(), settings.output_eps)
    return Call(
        LAYOUTS[settings.layout],
        settings.eps,
        settings.operand,
        like.dtype,
        Samples(settings.batch, settings.length, mask, ends, tensors.starts, tensors.row_count),
        settings.n_heads,
        tensors.cos,
        tensors.sin,
        settings.dropout,
        tensors.seed,
        norm,
    )


def _split(rest: Sequence[Any]) -> tuple[AuxiliaryTensors, Settings]:
    count = len(AuxiliaryTensors._fields)
    return AuxiliaryTensors(*rest[:count]), Settings(*rest[count:])


def _run(
    x: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    parameters: list[Tensor],
    matrices: list[Tensor],
    output_weight: Tensor | None,
    rest: Sequence[Any],
    *,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    tensors, settings = _split(rest)
    if settings.n > 0 and x is None:
        raise ValueError("latent steps require x")
    if settings.n > 0 and tensors.mask is not None:
        raise ValueError("a mask [B, L] is for single calls: pack the samples of a recursion")
    call = _call(y, output_weight, tensors, settings)
    blocks = unpack(call.layout, parameters, call.operand)
    with_matrices(blocks, matrices, call.operand, fp8=settings.fp8)
    x, z = (None if state is None else state.contiguous() for state in (x, z))
    memory = settings.memory if save else None
    out, new_z, saved = recursion_forward(
        call, blocks, x, y.contiguous(), z, settings.n, memory, tensors.read
    )
    return out, y.new_empty(0) if new_z is None else new_z, list(saved.values())


def _recursion(
    x: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    parameters: list[Tensor],
    matrices: list[Tensor],
    output_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return _run(x, y, z, parameters, matrices, output_weight, rest, save=False)[:2]


def _recursion_saving(
    x: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    parameters: list[Tensor],
    matrices: list[Tensor],
    output_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _run(x, y, z, parameters, matrices, output_weight, rest, save=True)


def _recursion_backward(
    grad_y: Tensor,
    grad_z: Tensor | None,
    saved: list[Tensor],
    pair: bool,
    needed: bool,
    parameters: list[Tensor],
    matrices: list[Tensor],
    output_weight: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    tensors, settings = _split(rest)
    call = _call(grad_y, output_weight, tensors, settings)
    blocks = with_matrices(unpack(call.layout, parameters, call.operand), matrices, call.operand)
    if call.samples.mask is not None:
        grad_y = grad_y.masked_fill(call.samples.mask[..., None] == 0, 0.0)
    spec = saved_spec(call, blocks, grad_y, settings.n + 1, settings.memory)
    found = recursion_backward(
        call,
        blocks,
        Saved(dict(zip(spec, saved, strict=True))),
        settings.n,
        grad_y.contiguous(),
        None if grad_z is None else grad_z.contiguous(),
        pair=pair,
        memory=settings.memory,
        needed=needed,
    )
    nothing = grad_y.new_empty(0)
    grad_output_weight = nothing
    if found.output_weight is not None and output_weight is not None:
        grad_output_weight = found.output_weight.to(output_weight.dtype)
    grad_inputs = [nothing if grad is None else grad for grad in (found.x, found.y, found.z)]
    return [
        *(grad.clone() if grad is nothing else grad for grad in grad_inputs),
        grad_output_weight,
        *found.parameters,
    ]


def _recursion_fake(
    x: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    parameters: list[Tensor],
    matrices: list[Tensor],
    output_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    tensors, settings = _split(rest)
    shape = y.shape if tensors.read is None else (1, tensors.read.shape[0], y.shape[2])
    return y.new_empty(shape), y.new_empty(0 if settings.n == 0 else y.shape)


def _recursion_saving_fake(
    x: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    parameters: list[Tensor],
    matrices: list[Tensor],
    output_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    tensors, settings = _split(rest)
    call = _call(y, output_weight, tensors, settings)
    blocks = unpack(call.layout, parameters, call.operand)
    spec = saved_spec(call, blocks, y, settings.n + 1, settings.memory)
    saved = [y.new_empty(shape, dtype=dtype) for shape, dtype in spec.values()]
    return *_recursion_fake(x, y, z, parameters, matrices, output_weight, *rest), saved


def _recursion_backward_fake(
    grad_y: Tensor,
    grad_z: Tensor | None,
    saved: list[Tensor],
    pair: bool,
    needed: bool,
    parameters: list[Tensor],
    matrices: list[Tensor],
    output_weight: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    _, settings = _split(rest)
    steps = settings.n > 0

    def like(there: bool) -> Tensor:
        return grad_y.new_empty(grad_y.shape if there else 0)

    grad_output_weight = grad_y.new_empty(0)
    if settings.output_eps is not None and output_weight is not None:
        grad_output_weight = output_weight.new_empty(output_weight.shape)
    # Contiguous, whatever the strides of the parameters.
    grad_parameters = [parameter.new_empty(parameter.shape) for parameter in parameters] if needed else []
    return [like(pair and steps), like(True), like(steps), grad_output_weight, *grad_parameters]


class _Recursion(torch.autograd.Function):
    """Accepts ``_LEADING`` arguments, parameters, matrices, :class:`AuxiliaryTensors`, :class:`Settings`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        y: Tensor,
        z: Tensor | None,
        output_weight: Tensor | None,
        counts: tuple[int, int],
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        n_parameters, n_matrices = counts
        parameters, rest = list(rest[:n_parameters]), rest[n_parameters:]
        matrices, rest = list(rest[:n_matrices]), rest[n_matrices:]
        tensors, settings = _split(rest)
        out, new_z, saved = recursion_saving(x, y, z, parameters, matrices, output_weight, *rest)
        ctx.save_for_backward(output_weight, *tensors, *parameters, *matrices, *saved)
        ctx.counts, ctx.settings = counts, settings
        ctx.given = x is not None, z is not None
        ctx.set_materialize_grads(False)
        if settings.n == 0:
            ctx.mark_non_differentiable(new_z)
        return out, new_z

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        n_parameters, n_matrices = ctx.counts
        output_weight, *found = ctx.saved_tensors
        static, found = found[: len(AuxiliaryTensors._fields)], found[len(AuxiliaryTensors._fields) :]
        parameters, found = found[:n_parameters], found[n_parameters:]
        matrices, saved = found[:n_matrices], found[n_matrices:]
        pair, has_z = ctx.given
        needed = any(ctx.needs_input_grad[_LEADING : _LEADING + n_parameters])
        if ctx.settings.n == 0:
            grad_z = None
        if grad_y is None:
            if grad_z is None:
                return (None,) * len(ctx.needs_input_grad)
            grad_y = torch.zeros_like(grad_z)
        grad_x, grad_old_y, grad_old_z, grad_output_weight, *gradients = recursion_gradient(
            grad_y, grad_z, saved, pair, needed, parameters, matrices, output_weight, *static, *ctx.settings
        )
        if ctx.settings.n == 0:
            grad_x, grad_old_z = None, grad_old_y if has_z else None
        return (
            grad_x if pair else None,
            grad_old_y,
            grad_old_z if has_z else None,
            grad_output_weight if output_weight is not None else None,
            None,
            *(gradients if needed else [None] * n_parameters),
            *[None] * (n_matrices + _STATIC),
        )


#: Number of arguments of :meth:`_Recursion.forward` before the parameters.
_LEADING = (
    sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in signature(_Recursion.forward).parameters.values()) - 1
)


def _differentiable(
    x: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    parameters: list[Tensor],
    matrices: list[Tensor],
    output_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    tensors, settings = _split(rest)
    if settings.fp8 or tensors.read is not None:
        raise RuntimeError(
            "a recursion in fp8, or of selected rows, has no gradient: run it under torch.no_grad()"
        )
    counts = len(parameters), len(matrices)
    return _Recursion.apply(x, y, z, output_weight, counts, *parameters, *matrices, *rest)


#: Dispatcher schema types for the fields of :class:`AuxiliaryTensors` and :class:`Settings`.
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor | None: "Tensor?",
    str: "str",
    Memory: "str",
    int: "SymInt",
    bool: "bool",
    float: "float",
    float | None: "float?",
    torch.dtype: "ScalarType",
}
_REST = ", ".join(
    (
        "Tensor[] parameters, Tensor[] matrices, Tensor? output_weight",
        *(
            f"{_SCHEMA_TYPES[kind]} {name}"
            for record in (AuxiliaryTensors, Settings)
            for name, kind in get_type_hints(record).items()
        ),
    )
)
_ARGUMENTS = f"Tensor? x, Tensor y, Tensor? z, {_REST}"
recursion_saving = define(
    "recursion_saving",
    f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor[])",
    _recursion_saving,
    _recursion_saving_fake,
)
recursion_gradient = define(
    "recursion_backward",
    f"(Tensor grad_y, Tensor? grad_z, Tensor[] saved, bool pair, bool needed, {_REST}) -> Tensor[]",
    _recursion_backward,
    _recursion_backward_fake,
)
#: ``recursion(x, y, z, parameters, matrices, output_weight, *AuxiliaryTensors, *Settings)`` returns the new y
#: and z [B, L, D] (z is empty if n is 0). x may be None if n is 0, and z may always be None. ``parameters``
#: are the concatenated flat lists of the blocks (:class:`~trm_kernels.ops.layouts.SublayerLayout`), and
#: ``matrices`` the result of :func:`~trm_kernels.ops.layouts.prepare`, or empty.
recursion = define(
    "recursion", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _recursion, _recursion_fake, _differentiable
)
