"""Backward through the second GEMM of an MLP and its activation, in one kernel.

d act = grad W                                  grad [m, K] of the output, W of the second GEMM
dY    = d act * f'(pre + bias)                  gradient of the pre-activation, bias included
act   = f(pre + bias)                           recomputed, for the gradient of W
G     = dY / rms(h_m)                           if the norm before the MLP is folded
dots  = partial sums over n of dY_n pre_n       for the backward of that norm in :mod:`~trm_kernels.ops.gemm`
and the partial sums over rows of dY, for the gradient of the bias
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import accumulator, cdiv, input_precision, launch, power_of_two, target_of
from trm_kernels.ops.dispatch import choose
from trm_kernels.ops.gemm import program_tile, sigmoid
from trm_kernels.ops.norm import row_sum_parts
from trm_kernels.ops.tiles import Activation, Problem

_GELU = tl.constexpr(Activation.GELU_BACKWARD.value)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def activation_gradient_kernel(
    grad_ptr,
    w_ptr,
    pre_ptr,
    bias_ptr,
    sumsq_ptr,
    count_ptr,
    act_ptr,
    g_ptr,
    dots_ptr,
    columns_ptr,
    M,
    N,
    K,
    w_row,
    w_col,
    eps,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NORMED: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n, batch = program_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = tl.arange(0, BLOCK_K)  # [BK]
    rows = M
    depth = K
    if PACKED:
        rows = tl.load(count_ptr)
        depth = tl.where(tile_m * BLOCK_M < rows, K, 0)
    in_m = m < rows
    in_n = n < N
    valid = in_m[:, None] & in_n[None, :]
    WIDTH = N if ACTIVATION == _GELU else 2 * N
    row, col = (1, M) if TRANSPOSED else (K, 1)
    c_row, c_col = (1, M) if TRANSPOSED else (N, 1)
    g_row, g_col = (1, M) if TRANSPOSED else (WIDTH, 1)
    p_grad = grad_ptr + batch * K * M + m.to(tl.int64)[:, None] * row + k[None, :] * col  # [BM, BK]
    p_w = w_ptr + n.to(tl.int64)[None, :] * w_row + k[:, None] * w_col  # [BK, BN]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, depth, BLOCK_K):
        in_k = k < depth - start
        b_grad = tl.load(p_grad, mask=in_m[:, None] & in_k[None, :], other=0.0)
        b_w = tl.load(p_w, mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(b_grad, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
        p_grad += BLOCK_K * col
        p_w += BLOCK_K * w_col

    o_act = batch * N * M + m.to(tl.int64)[:, None] * c_row + n.to(tl.int64)[None, :] * c_col
    o_g = batch * WIDTH * M + m.to(tl.int64)[:, None] * g_row + n.to(tl.int64)[None, :] * g_col
    rstd = tl.full((BLOCK_M,), 1.0, dtype=ACC)
    if NORMED:
        rstd = tl.rsqrt(row_sum_parts(sumsq_ptr, m, in_m, PARTS, PARTS_BLOCK, ACC) / K + eps)
    pre = tl.load(pre_ptr + o_g, mask=valid, other=0.0).to(ACC)
    if ACTIVATION == _GELU:
        x = pre
        if HAS_BIAS:
            x += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(ACC)[None, :]
        cdf = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        act = x * cdf
        grad = acc * (cdf + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI)
        dot = grad * pre
    else:
        up = tl.load(pre_ptr + o_g + N * g_col, mask=valid, other=0.0).to(ACC)
        gate_sigmoid = sigmoid(pre)
        silu = pre * gate_sigmoid
        act = silu * up
        grad = acc * up * gate_sigmoid * (1.0 + pre * (1.0 - gate_sigmoid))
        grad_up = acc * silu
        # grad_up up = acc act is the contribution of the up projection to the dot.
        dot = grad * pre + acc * act
        grad_up *= rstd[:, None]
        tl.store(g_ptr + o_g + N * g_col, grad_up.to(g_ptr.dtype.element_ty), mask=valid)
    tl.store(act_ptr + o_act, act.to(act_ptr.dtype.element_ty), mask=valid)
    if NORMED:
        parts = tl.cdiv(N, BLOCK_N)
        tl.store(dots_ptr + m.to(tl.int64) * parts + tile_n, tl.sum(dot, axis=1), mask=in_m)
    if HAS_BIAS:
        # Padding adds nothing, because its gradients and pre-activations are loaded as zeros.
        part = batch * tl.cdiv(M, BLOCK_M) + tile_m
        tl.store(columns_ptr + part * N + n, tl.sum(grad, axis=0), mask=in_n)
    tl.store(g_ptr + o_g, (grad * rstd[:, None]).to(g_ptr.dtype.element_ty), mask=valid)


_DERIVATIVE = {Activation.GELU: Activation.GELU_BACKWARD, Activation.SWIGLU: Activation.SWIGLU_BACKWARD}


@dataclass
class ActivationGradient:
    """Outputs of the kernel."""

    g: Tensor  # gradient of the first GEMM's output, [B, L, N or 2 N]; over rms(h) if its norm is folded
    act: Tensor  # [B, L, N]
    dots: Tensor | None  # [rows, parts]
    bias: Tensor | None  # gradient of the first bias [N], float32


def activation_gradient(
    grad: Tensor,
    weight: Tensor,
    pre: Tensor,
    *,
    activation: Activation,
    bias: Tensor | None = None,
    sumsq: Tensor | None = None,
    eps: float = 0.0,
    count: Tensor | None = None,
    transposed: bool = False,
    g: Tensor | None = None,
    act: Tensor | None = None,
) -> ActivationGradient:
    """Launch the kernel.

    Args:
        grad: Contiguous gradient of the MLP's output [B, L, K] (``transposed``: [B, K, D]), operand dtype.
        weight: Weight of the second GEMM, [K, N], any strides.
        pre: Pre-activations without the bias, [B, L, N]; gate next to up for SwiGLU.
        activation: Activation of the forward.
        sumsq: Partial sums of squares [m, parts] of the rows of h [B, L, K], if its norm is folded.
        count: Number of packed rows, int32 [1].
        g, act: Output tensors; allocated if None.
    """
    batches, outer, inner = grad.shape
    N = weight.shape[1]
    M, K, batch = (inner, outer, batches) if transposed else (batches * outer, inner, 1)
    kind = _DERIVATIVE[activation]
    choice = choose(
        Problem("activation_gradient", M, N, K, batch, kind, grad.dtype, transposed), target_of(grad)
    )
    tile = choice.tile
    g = torch.empty_like(pre) if g is None else g
    if act is None:
        act = grad.new_empty((batches, N, inner) if transposed else (batches, outer, N))
    wide = torch.promote_types(grad.dtype, torch.float32)
    parts = 0 if sumsq is None else sumsq.shape[1]
    dots = None if sumsq is None else grad.new_empty((M, cdiv(N, tile.n)), dtype=wide)
    columns = None if bias is None else grad.new_empty((cdiv(M, tile.m) * batch, N), dtype=wide)
    launch(
        activation_gradient_kernel,
        (cdiv(M, tile.m) * cdiv(N, tile.n) * batch,),
        grad, weight, pre, bias, sumsq, count, act, g, dots, columns,
        M, N, K, weight.stride(1), weight.stride(0), eps,
        ACTIVATION=int(kind),
        TRANSPOSED=transposed,
        NORMED=sumsq is not None,
        PARTS=parts,
        PARTS_BLOCK=power_of_two(parts),
        HAS_BIAS=bias is not None,
        PACKED=count is not None,
        ACC=accumulator(grad.dtype),
        PRECISION=input_precision(grad.dtype),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=8,
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip
    return ActivationGradient(g, act, dots, None if columns is None else columns.sum(0))
