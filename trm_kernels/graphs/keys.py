"""What a graph depends on besides its inputs: modules it reads, and the state of the process."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_internals

from trm_kernels import backends


def ambient(device: torch.device) -> tuple[Hashable, ...]:
    """The settings that decide which kernels a call launches on ``device``."""
    kind = device.type
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        backends.requested(),
    )


def storage(tensor: Tensor) -> tuple[Hashable, ...]:
    """Where a tensor's data lies and how it is read."""
    return tensor.data_ptr(), tensor.dtype, tensor.numel(), tensor.requires_grad


class ModuleWatch:
    """Notices changes to modules that a captured graph would not.

    A graph reads parameters where they lay when it was captured: new values in place are seen, new storage
    (``.to()``, ``load_state_dict(assign=True)``, another parameter or submodule in its place) is not. Python
    that runs around a module's forward is not seen either.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = list(modules)
        self._scan()

    def _scan(self) -> None:
        seen = {module: None for root in self._roots for module in root.modules()}
        self._modules = list(seen)
        self._children = [tuple(module._modules.values()) for module in self._modules]

    def key(self) -> tuple[Hashable, ...]:
        """Changes whenever a graph that was captured with these modules no longer computes what they do."""
        # By the modules' own dictionaries: walking the tree takes five times as long, on every call.
        for module, children in zip(self._modules, self._children, strict=True):
            if tuple(module._modules.values()) != children:
                self._scan()
                break
        return tuple(
            (
                id(module),
                module.training,
                *(storage(t) for t in module._parameters.values() if t is not None),
                *(storage(t) for t in module._buffers.values() if t is not None),
            )
            for module in self._modules
        )

    def requires_grad(self) -> bool:
        """Whether any parameter does."""
        return any(
            tensor is not None and tensor.requires_grad
            for module in self._modules
            for tensor in module._parameters.values()
        )

    def hooks(self) -> str | None:
        """Which hooks a replay would not call, or None."""
        if module_internals._global_forward_hooks or module_internals._global_forward_pre_hooks:
            return "there are global module hooks, which a replay would not call"
        for module in self._modules:
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return f"a {type(module).__name__} has hooks, which a replay would not call"
        return None

    def wrapped(self) -> str | None:
        """Which parameter has no storage of its own to watch (sharded, quantised), or None."""
        for module in self._modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and type(tensor) not in (nn.Parameter, Tensor):
                    return f"a {type(module).__name__} holds a {type(tensor).__name__}, not a plain tensor"
        return None

    def communicates(self) -> str | None:
        """Why a step of these modules would run collectives, or None."""
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return "several processes train together: collectives in a graph are not proven"
        for module in self._modules:
            if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
                return f"a {type(module).__name__} communicates: collectives in a graph are not proven"
        return None
