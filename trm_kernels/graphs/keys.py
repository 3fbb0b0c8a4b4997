"""State other than its inputs that a graph depends on: the modules that it reads, and process settings."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_internals

from trm_kernels import backends, prepared
from trm_kernels.graphs.capture import CaptureError
from trm_kernels.module import FusedModule

#: Maximum number of module states that a watch remembers, to find their graphs again.
_MAX_STATES = 256

_KIND = attrgetter("dtype", "requires_grad")
_PLAIN = frozenset((Tensor, nn.Parameter))


def ambient(device: torch.device) -> tuple[Hashable, ...]:
    """Return the settings that determine which kernels a call launches on ``device``."""
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
    """Return the address of a tensor's data and how it is read."""
    return tensor.data_ptr(), tensor.dtype, tensor.numel(), tensor.requires_grad


def _held(stores: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """Yield the tensors in dictionaries of parameters or buffers."""
    return (tensor for store in stores for tensor in store.values() if tensor is not None)


class ModuleWatch:
    """Detects changes to modules that a captured graph would miss.

    A graph reads parameters at the addresses they had at capture, so it sees new values written in place. It
    does not see new storage (``.to()``, ``load_state_dict(assign=True)``, a replaced parameter or submodule),
    new strides (``weight.data = weight.data.T``), or Python code around a module's forward.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = list(modules)
        self._numbers: dict[tuple[Hashable, ...], int] = {}
        self._latest: tuple[tuple[Hashable, ...], int] = ((), -1)
        self._count = 0
        #: Ids of the freezes in effect when :meth:`key` was last called.
        self.freeze_ids: list[int] = []
        self._names = {"weight", "bias"}
        self._scan()

    def _scan(self) -> None:
        seen = {module: None for root in self._roots for module in root.modules()}
        self._modules = list(seen)
        self._submodules: list[dict[str, Any]] = [module._modules for module in seen]
        self._stores: list[dict[str, Any]] = [
            store for module in seen for store in (module._parameters, module._buffers)
        ]
        self._networks = [
            (module, [part._parameters for part in module.modules()])
            for module in seen
            if isinstance(module, FusedModule)
        ]
        self._names.update(*(module._parameters for module in seen))
        self._children = self._child_ids()

    def _child_ids(self) -> list[int]:
        return [*map(id, chain.from_iterable(map(dict.values, self._submodules)))]

    def _tensors(self) -> list[Tensor]:
        values = chain.from_iterable(map(dict.values, self._stores))
        return [tensor for tensor in values if tensor is not None]

    def key(self) -> int:
        """Return a key that changes whenever a graph captured with these modules becomes invalid.

        Raises:
            CaptureError: If a parameter or buffer has no storage of its own to watch (sharded, quantised), or
                if a plain tensor has replaced a parameter.
            FrozenError: If a network is frozen and its weights have changed.
        """
        # Every call runs this. Not walking the module tree, and looping in C, takes a tenth of the time.
        if self._child_ids() != self._children:
            self._scan()
        tensors = self._tensors()
        if not _PLAIN.issuperset(map(type, tensors)):
            kinds = sorted({type(tensor).__name__ for tensor in tensors if type(tensor) not in _PLAIN})
            raise CaptureError(f"a module holds a {kinds[0]}, not a plain tensor")
        # While a network is frozen, graphs read the matrices prepared from its weights.
        self.freeze_ids = [prepared.freeze_id(net, _held(stores)) for net, stores in self._networks]
        state = (
            *self._children,
            *[module.training for module in self._modules],
            *map(Tensor.data_ptr, tensors),
            *map(Tensor.numel, tensors),
            *map(Tensor.stride, tensors),
            *map(_KIND, tensors),
            *self.freeze_ids,
        )
        latest, number = self._latest
        if state != latest:
            number = self._number(state)
            self._latest = state, number
        return number

    def _number(self, state: tuple[Hashable, ...]) -> int:
        if state not in self._numbers:
            self._refuse_plain_tensors()
            if len(self._numbers) >= _MAX_STATES:
                self._numbers.clear()  # numbers are never reused
            self._numbers[state] = self._count
            self._count += 1
        return self._numbers[state]

    def _refuse_plain_tensors(self) -> None:
        # Scanning all attributes in every call takes too long, so later replacements would go unnoticed.
        for module in self._modules:
            for name in self._names & vars(module).keys():
                if isinstance(vars(module)[name], Tensor):
                    kind = type(module).__name__
                    raise CaptureError(f"{name} of a {kind} is a plain tensor, not a parameter or buffer")

    def requires_grad(self) -> bool:
        """Whether any parameter requires gradients."""
        return any(tensor.requires_grad for tensor in self._tensors())

    def hooks(self) -> str | None:
        """Return which hooks a replay would not call, or None."""
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

    def communicates(self) -> str | None:
        """Return why a step of these modules would run collectives, or None."""
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return "several processes train together: collectives in a graph are untested"
        for module in self._modules:
            if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
                return f"a {type(module).__name__} communicates: collectives in a graph are untested"
        return None
