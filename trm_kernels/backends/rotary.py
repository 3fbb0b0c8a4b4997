"""The RoPE tables that kernels read, computed once per shape."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from trm_kernels import reference
from trm_kernels.config import NetworkConfig
from trm_kernels.streams import Shared


def tables(config: NetworkConfig, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return contiguous RoPE tables [L, E/2] for states like ``x``, cached by shape."""
    wide = torch.promote_types(x.dtype, torch.float32)
    arguments = length, config.head_dim, config.rope_theta, wide, x.device
    if torch.compiler.is_compiling():
        return _make(*arguments)
    # Do not cache tensors of a captured graph, which are valid only in its memory and after a replay, or of a
    # dispatch mode, which may not be real tensors.
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
    # Tensors created in inference mode cannot be saved for a later backward.
    with torch.inference_mode(False):
        return Shared(_make(length, head_dim, theta, dtype, device))
