"""The RoPE tables that kernels read, made once for each shape."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from trm_kernels import reference
from trm_kernels.config import NetworkConfig
from trm_kernels.streams import Shared


def tables(config: NetworkConfig, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous RoPE tables [L, E/2] for states like ``x``; the same tensors again for the same shape."""
    wide = torch.promote_types(x.dtype, torch.float32)
    arguments = length, config.head_dim, config.rope_theta, wide, x.device
    if torch.compiler.is_compiling():
        return _make(*arguments)
    # What a captured graph computes exists only in its own memory and only after a replay; what a dispatch
    # mode makes may be no real tensor.
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or torch._C._len_torch_dispatch_stack() > 0 or type(x) not in (Tensor, nn.Parameter):
        return _make(*arguments)
    cos, sin = _cached(*arguments).read()
    return cos, sin


def _make(
    length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    like = torch.empty((), dtype=dtype, device=device)
    cos, sin = reference.rotary_tables(length, head_dim, theta, like)
    return cos.contiguous(), sin.contiguous()


@functools.lru_cache(maxsize=32)
def _cached(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Shared:
    # Tensors made in inference mode could not be saved for a later backward.
    with torch.inference_mode(False):
        return Shared(_make(length, head_dim, theta, dtype, device))
