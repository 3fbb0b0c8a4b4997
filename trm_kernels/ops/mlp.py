"""The MLP sublayer on its own: ``x + second(act(first(norm(x))))`` in two or three kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_kernels.ops._library import define, first_order
from trm_kernels.ops.sublayer import (
    LAYOUTS,
    Call,
    Sublayer,
    first_half,
    second_half,
    sublayer_backward,
    unpack_sublayer,
)


def _prepare(
    x: Tensor, parameters: list[Tensor], mask: Tensor | None, layout: str, eps: float, operand: torch.dtype
) -> tuple[Call, Sublayer]:
    mask = None if mask is None else mask.contiguous()
    call = Call(LAYOUTS[layout], eps, operand, residual=x.dtype, mask=mask)
    return call, unpack_sublayer(call.layout, call.layout.mlp, iter(parameters))


def _mlp_saving(
    x: Tensor, parameters: list[Tensor], mask: Tensor | None, layout: str, eps: float, operand: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    call, sublayer = _prepare(x, parameters, mask, layout, eps, operand)
    x = x.contiguous()
    inner, pre = first_half(call, sublayer, x, None, save=True)
    out, _, unnormed = second_half(call, sublayer, inner, x, mask)
    assert pre is not None
    return out, [pre] if unnormed is None else [pre, unnormed]


def _mlp(
    x: Tensor, parameters: list[Tensor], mask: Tensor | None, layout: str, eps: float, operand: torch.dtype
) -> Tensor:
    call, sublayer = _prepare(x, parameters, mask, layout, eps, operand)
    x = x.contiguous()
    inner, _ = first_half(call, sublayer, x, None, save=False)
    return second_half(call, sublayer, inner, x, mask)[0]


def _mlp_backward(
    grad: Tensor,
    saved: list[Tensor],
    x: Tensor,
    parameters: list[Tensor],
    mask: Tensor | None,
    layout: str,
    eps: float,
    operand: torch.dtype,
) -> list[Tensor]:
    call, sublayer = _prepare(x, parameters, mask, layout, eps, operand)
    pre, *unnormed = saved
    grad = call.incoming(grad)
    grad_x, gradients = sublayer_backward(
        call, sublayer, grad, x.contiguous(), unnormed[0] if unnormed else None, [pre]
    )
    return [grad_x, *gradients.flat()]


def _mlp_fake(x: Tensor, parameters: list[Tensor], *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _mlp_saving_fake(
    x: Tensor, parameters: list[Tensor], mask: Tensor | None, layout: str, eps: float, operand: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    call, sublayer = _prepare(x, parameters, mask, layout, eps, operand)
    saved = [x.new_empty((*x.shape[:2], sum(weight.shape[0] for weight in sublayer.first)), dtype=operand)]
    if not call.layout.pre_norm:
        saved.append(x.new_empty(x.shape))
    return x.new_empty(x.shape), saved


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
#: ``mlp(x, parameters, mask, layout, eps, operand)``: the MLP sublayer of a family on x [B, L, D], with the
#: sublayer's parameters in the order of :class:`~trm_kernels.ops.sublayer.SublayerLayout`; rows where the
#: uint8 mask [B, L] is 0 come out as zeros.
mlp = define("mlp", f"({_ARGUMENTS}) -> Tensor", _mlp, _mlp_fake, _mlp_differentiable)
