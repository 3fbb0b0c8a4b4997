"""What a graph depends on besides its inputs: modules it reads, and the state of the process."""

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

#: How many states of its modules a watch remembers, to find their graphs again.
_STATES = 256

_KIND = attrgetter("dtype", "requires_grad")
_PLAIN = frozenset((Tensor, nn.Parameter))


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


def _held(stores: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """The tensors in parameters or buffers of modules."""
    return (tensor for store in stores for tensor in store.values() if tensor is not None)


class ModuleWatch:
    """Notices changes to modules that a captured graph would not.

    A graph reads parameters where they lay when it was captured: new values in place are seen. New storage
    (``.to()``, ``load_state_dict(assign=True)``, another parameter or submodule in its place) is not, nor is
    the same in another order (``weight.data = weight.data.T``), nor Python around a module's forward.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = list(modules)
        self._numbers: dict[tuple[Hashable, ...], int] = {}
        self._latest: tuple[tuple[Hashable, ...], int] = ((), -1)
        self._count = 0
        #: Numbers of the promises under which the latest :meth:`key` was made.
        self.promises: list[int] = []
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
        """Changes whenever a graph that was captured with these modules no longer computes what they do.

        Raises:
            CaptureError: A parameter or buffer has no storage of its own to watch (sharded, quantised), or a
                plain tensor has taken a parameter's place.
            FrozenError: A network is frozen, and its weights are no longer what they were.
        """
        # On every call, so without walking the tree, and with the loops in C: a tenth of the time.
        if self._child_ids() != self._children:
            self._scan()
        tensors = self._tensors()
        if not _PLAIN.issuperset(map(type, tensors)):
            kinds = sorted({type(tensor).__name__ for tensor in tensors if type(tensor) not in _PLAIN})
            raise CaptureError(f"a module holds a {kinds[0]}, not a plain tensor")
        # While a network is frozen, graphs read what was made of its weights.
        self.promises = [prepared.number(net, _held(stores)) for net, stores in self._networks]
        state = (
            *self._children,
            *[module.training for module in self._modules],
            *map(Tensor.data_ptr, tensors),
            *map(Tensor.numel, tensors),
            *map(Tensor.stride, tensors),
            *map(_KIND, tensors),
            *self.promises,
        )
        latest, number = self._latest
        if state != latest:
            number = self._number(state)
            self._latest = state, number
        return number

    def _number(self, state: tuple[Hashable, ...]) -> int:
        if state not in self._numbers:
            self._refuse_plain_tensors()
            if len(self._numbers) >= _STATES:
                self._numbers.clear()  # numbers are not used again
            self._numbers[state] = self._count
            self._count += 1
        return self._numbers[state]

    def _refuse_plain_tensors(self) -> None:
        # One that follows it would go unseen: looking through all attributes on every call takes too long.
        for module in self._modules:
            for name in self._names & vars(module).keys():
                if isinstance(vars(module)[name], Tensor):
                    kind = type(module).__name__
                    raise CaptureError(f"{name} of a {kind} is a plain tensor, no parameter or buffer")

    def requires_grad(self) -> bool:
        """Whether any parameter does."""
        return any(tensor.requires_grad for tensor in self._tensors())

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

    def communicates(self) -> str | None:
        """Why a step of these modules would run collectives, or None."""
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return "several processes train together: collectives in a graph are not proven"
        for module in self._modules:
            if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
                return f"a {type(module).__name__} communicates: collectives in a graph are not proven"
        return None
