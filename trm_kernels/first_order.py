"""A decorator for backward functions that cannot be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Make the backward of an ``autograd.Function`` raise if it is differentiated again.

    ``once_differentiable`` raises only if an incoming gradient requires a gradient. ``out.sum()`` passes a
    constant, so a gradient penalty on it would silently vanish.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():  # enabled here means create_graph=True
            return found
        message = b"the fused kernels have no second derivative: use the eager backend for create_graph=True"
        raise_later: Callable[..., Any] = torch._C._functions.DelayedError(message, len(found))
        return raise_later(*(None if g is None else g.detach().requires_grad_() for g in found))

    return wrapped
