"""Optimizers that CUDA graphs can capture, and checks for obstacles in other optimizers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim import optimizer as internals

from trm_kernels import arguments
from trm_kernels.graphs.keys import storage
from trm_kernels.optim.adam_atan2 import AdamATan2

_NEEDS = attrgetter("requires_grad")


def capturable_adamw(parameters: Iterable[Any], lr: float, **options: Any) -> AdamW:
    """Build a fused AdamW with learning rates in device tensors, so that schedules work between replays.

    Args:
        parameters: Parameters or groups as for :class:`torch.optim.AdamW`, on one device.
        lr: Learning rate of groups without their own.
        **options: Other arguments of :class:`torch.optim.AdamW`.

    Raises:
        ValueError: If a learning rate is negative or not finite, or if there are no parameters.
    """
    groups, device = _groups(parameters, lr)
    # torch rejects capturable=True on devices without graphs.
    return AdamW(groups, lr=groups[0]["lr"], fused=True, capturable=device.type == "cuda", **options)


def capturable_adam_atan2(parameters: Iterable[Any], lr: float, **options: Any) -> AdamATan2:
    """Build an :class:`AdamATan2` with learning rates in device tensors, as :func:`capturable_adamw` does.

    Args:
        parameters: Parameters or groups, on one device.
        lr: Learning rate of groups without their own.
        **options: Other arguments of :class:`AdamATan2`.
    """
    groups, _ = _groups(parameters, lr)
    return AdamATan2(groups, lr=groups[0]["lr"], capturable=True, **options)


def _groups(parameters: Iterable[Any], lr: float) -> tuple[list[dict[str, Any]], torch.device]:
    """Convert ``parameters`` to groups, each with its own learning rate as a tensor on their device."""
    groups = list(parameters)
    if not groups:
        raise ValueError("there are no parameters")
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    device = groups[0]["params"][0].device
    for group in groups:
        rate = group.get("lr", lr)
        arguments.real("lr", float(rate) if isinstance(rate, Tensor) else rate)
        group["lr"] = torch.tensor(float(rate), device=device)
    return groups, device


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters that ``optimizer`` updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def refusal(optimizer: Optimizer) -> str | None:
    """Return why a step of ``optimizer`` cannot be captured, or None."""
    for group in optimizer.param_groups:
        if not group.get("capturable", False):
            return "the optimizer was built without capturable=True"
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != group["params"][0].device:
            return "a learning rate is not a tensor on the device, so a graph would never see changes to it"
    # The parts of a JointOptimizer have their own hooks.
    for one in (optimizer, *getattr(optimizer, "optimizers", ())):
        if one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks:
            return "the optimizer has hooks, which a replay would not call"
    for parameter in parameters_of(optimizer):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return "a parameter has gradient hooks, which a replay would not call"
    return None


def settings(optimizer: Optimizer) -> tuple[Hashable, ...]:
    """Return everything that a captured step of ``optimizer`` fixes: numbers, and tensor addresses."""
    return tuple(
        (
            (*map(Tensor.data_ptr, group["params"]), *map(_NEEDS, group["params"])),
            tuple(
                (name, storage(value) if isinstance(value, Tensor) else value)
                for name, value in group.items()
                if name != "params"
            ),
        )
        for group in optimizer.param_groups
    )


def call_global_post_hooks(optimizer: Optimizer) -> None:
    """Call the global optimizer post-hooks after a replayed step."""
    for hook in list(internals._global_optimizer_post_hooks.values()):
        hook(optimizer, (), {})
