"""The MLP sublayer as a separate op: ``x + second(act(first(norm(x))))`` in two or three kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_kernels.first_order import first_order
from trm_kernels.ops._library import define
from trm_kernels.ops.attention_common import Samples
from trm_kernels.ops.chain import enter
from trm_kernels.ops.layouts import LAYOUTS, Block, Sublayer, unpack_sublayer, with_matrices
from trm_kernels.ops.stream import Stream
from trm_kernels.ops.sublayer import Call, first_half, last_half
from trm_kernels.ops.sublayer_backward import SublayerGradient, sublayer_backward


def _prepare(
    x: Tensor, parameters: list[Tensor], mask: Tensor | None, layout: str, eps: float, operand: torch.dtype
) -> tuple[Call, Sublayer]:
    batch, length, _ = x.shape
    samples = Samples(batch, length, None if mask is None else mask.contiguous())
    call = Call(LAYOUTS[layout], eps, operand, x.dtype, samples)
    return call, unpack_sublayer(call.layout, call.layout.mlp, iter(parameters), operand)


def _forward(call: Call, sublayer: Sublayer, x: Tensor, saved: dict[str, Tensor]) -> tuple[Stream, Tensor]:
    """Return the input stream of the sublayer, and its output."""
    block = Block(sublayer, sublayer)
    with_matrices([block], [], call.operand)
    stream, _ = enter(call, [block], None, x.contiguous(), None, {})
    inner = first_half(call, sublayer, stream, saved.get("pre"), save=bool(saved))
    out, _ = last_half(
        call, sublayer, inner, stream, saved, addend=None, keep=True, mask=call.samples.mask, reader=None,
        reader_slot={},
    )  # fmt: skip
    assert out is not None
    return stream, out


def _saved(call: Call, sublayer: Sublayer, x: Tensor) -> dict[str, Tensor]:
    """Allocate the tensors saved for the backward."""
    saved = {"pre": x.new_empty((*x.shape[:2], sublayer.inner), dtype=call.operand)}
    return saved if call.layout.pre_norm else saved | {"sum": x.new_empty(x.shape)}


def _mlp_saving(x: Tensor, parameters: list[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
    call, sublayer = _prepare(x, parameters, *rest)
    saved = _saved(call, sublayer, x)
    _, out = _forward(call, sublayer, x, saved)
    return out, list(saved.values())


def _mlp(x: Tensor, parameters: list[Tensor], *rest: Any) -> Tensor:
    return _forward(*_prepare(x, parameters, *rest), x, {})[1]


def _mlp_backward(
    grad: Tensor,
    saved: list[Tensor],
    x: Tensor,
    parameters: list[Tensor],
    mask: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    call, sublayer = _prepare(x, parameters, mask, *rest)
    if mask is not None:
        grad = grad.masked_fill(mask[..., None] == 0, 0.0)
    block = Block(sublayer, sublayer)
    with_matrices([block], [], call.operand)
    stream, _ = enter(call, [block], None, x.contiguous(), None, {})
    slot = {f"mlp.{name}": tensor for name, tensor in zip(("pre", "sum"), saved, strict=False)}
    gradient = SublayerGradient(sublayer, None)
    back, products = sublayer_backward(
        call, sublayer, Stream(grad.to(x.dtype).contiguous()), 0, slot, stream, gradient,
        lambda _, shape, dtype: x.new_empty(shape, dtype=dtype),
    )  # fmt: skip
    assert products.inner is not None
    a = stream.operand if products.a is None else products.a
    gradient.add(products.g, a, products.grad, products.inner, x.shape[0] * x.shape[1])
    return [back.value, *gradient.totals()]


def _mlp_fake(x: Tensor, parameters: list[Tensor], *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _mlp_saving_fake(x: Tensor, parameters: list[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape), list(_saved(*_prepare(x, parameters, *rest), x).values())


def _mlp_backward_fake(
    grad: Tensor, saved: list[Tensor], x: Tensor, parameters: list[Tensor], *rest: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape), *(parameter.new_empty(parameter.shape) for parameter in parameters)]


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, static: tuple[Any, ...], *parameters: Tensor
    ) -> Tensor:
        out, saved = mlp_saving(x, list(parameters), mask, *static)
        ctx.save_for_backward(x, mask, *parameters, *saved)
        ctx.static, ctx.count = static, len(parameters)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, *tensors = ctx.saved_tensors
        parameters, saved = tensors[: ctx.count], tensors[ctx.count :]
        grad_x, *gradients = mlp_backward(grad, saved, x, parameters, mask, *ctx.static)
        return grad_x, None, None, *gradients


def _mlp_differentiable(x: Tensor, parameters: list[Tensor], mask: Tensor | None, *static: Any) -> Tensor:
    return _Mlp.apply(x, mask, static, *parameters)


_ARGUMENTS = "Tensor x, Tensor[] parameters, Tensor? mask, str layout, float eps, ScalarType operand"
mlp_saving = define("mlp_saving", f"({_ARGUMENTS}) -> (Tensor, Tensor[])", _mlp_saving, _mlp_saving_fake)
mlp_backward = define(
    "mlp_backward",
    f"(Tensor grad, Tensor[] saved, {_ARGUMENTS}) -> Tensor[]",
    _mlp_backward,
    _mlp_backward_fake,
)
#: ``mlp(x, parameters, mask, layout, eps, operand)`` applies the MLP sublayer of a family to x [B, L, D]. The
#: parameters are in the order of :class:`~trm_kernels.ops.layouts.SublayerLayout`. Output rows are zero where
#: the uint8 mask [B, L] is 0.
mlp = define("mlp", f"({_ARGUMENTS}) -> Tensor", _mlp, _mlp_fake, _mlp_differentiable)
