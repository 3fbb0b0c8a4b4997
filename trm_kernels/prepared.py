"""What kernels read of weights, prepared once for all calls of a network that is declared frozen.

Everywhere else a call computes with the weights as they are. No pointer, version or hook tells of every write
to them (``.data``, NumPy's views, other processes, kernels of others), so a promise takes their place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trm_kernels import native_weights
from trm_kernels.streams import Shared


class FrozenError(RuntimeError):
    """Something would change weights that were declared frozen, or has changed them."""


_REMEDY = "do it outside of trm_kernels.frozen(), or without frozen=True"

#: The promises that cover each network, the first of which counts. Neither they nor what was made holds the
#: network: a promise that the network itself holds ends with it.
_promises: WeakKeyDictionary[nn.Module, list[Frozen]] = WeakKeyDictionary()
_numbers = count(1)
_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # A thread that is not in the child may have held it.
    os.register_at_fork(after_in_child=_new_lock)


class Frozen:
    """A promise that the networks inside ``modules`` keep their weights, in a ``with`` block or until closed.

    Args:
        modules: Networks of this package, or modules that hold some, in evaluation mode.

    Raises:
        ValueError: There is no network of this package in them, or one is in training mode.
    """

    def __init__(self, *modules: nn.Module) -> None:
        inner = {net: None for module in modules for net in module.modules()}
        networks = [net for net in inner if isinstance(net, Freezable)]
        if not networks:
            kinds = ", ".join(type(module).__name__ for module in modules) or "module"
            raise ValueError(f"nothing to freeze: there is no network of trm_kernels in this {kinds}")
        if any(net.training for net in networks):
            raise ValueError("a network in training mode cannot be frozen: call eval() first")
        #: In the keys of graphs, which read matrices where they lie.
        self.number = next(_numbers)
        # The tensors are held, and their memory too, should `.data` get another: so no other tensor can be
        # given their ids or their addresses.
        self._weights = {
            id(weight): (weight, weight.detach(), _place(weight), _version(weight))
            for net in networks
            for weight in net.parameters()
        }
        self._made: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[list[int], Shared]]] = (
            WeakKeyDictionary((net, {}) for net in networks)
        )
        self._hook: Any = None

    def open(self) -> Frozen:
        """Begin; once only."""
        if self._hook is not None:
            raise RuntimeError("this promise has begun already: make another with trm_kernels.frozen()")
        with _lock:
            for net in self._made:
                _promises.setdefault(net, []).append(self)
            self._hook = register_optimizer_step_pre_hook(self._refuse_step)
        return self

    def close(self) -> None:
        """End, and drop what was made."""
        with _lock:
            if self._hook is None:
                return
            self._hook.remove()
            self._hook = None
            for net, made in self._made.items():
                made.clear()
                _promises[net].remove(self)
                if not _promises[net]:
                    del _promises[net]

    def __enter__(self) -> None:
        self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def matrices(
        self, net: nn.Module, parameters: Sequence[Tensor], form: Hashable, make: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """What :func:`matrices` gives where a promise covers ``net``."""
        self.check(parameters)
        capturing = _is_capturing(parameters[0])
        reading: _Reading = getattr(_local, "reading", _NOTHING)
        if capturing and self.number not in reading.promises:
            return make()  # whoever captures knows nothing of the promise, and may replay after its end
        names = [*map(id, parameters)]
        with _lock:
            found = self._made[net].get(form)
            if found is None:
                if capturing:
                    return make()  # in the graph's memory, and anew on every replay
                # Tensors made in inference mode could not be saved for a later backward.
                with torch.inference_mode(False), torch.no_grad():
                    found = self._made[net][form] = names, Shared(make())
        if found[0] != names:
            raise FrozenError(f"weights of a frozen network have changed places: {_REMEDY}")
        if not capturing:
            return found[1].read()
        # What was made before a capture is there: a capture begins when its device has nothing left to do.
        reading.tensors.extend(found[1].tensors)
        return found[1].tensors

    def check(self, weights: Iterable[Tensor]) -> None:
        """Raise FrozenError for weights that were not frozen, or that something tells of a write to."""
        for weight in weights:
            found = self._weights.get(id(weight))
            if found is None:
                raise FrozenError(f"a frozen network has been given other weights: {_REMEDY}")
            _, _, place, version = found
            if _place(weight) != place or _version(weight) != version:
                raise FrozenError(f"the weights of a frozen network have been written to: {_REMEDY}")

    def _refuse_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if any(id(weight) in self._weights for group in optimizer.param_groups for weight in group["params"]):
            raise FrozenError(f"an optimizer's step would change a frozen network: {_REMEDY}")


def frozen(module: nn.Module) -> Frozen:
    """Serve networks whose weights do not change: what kernels read of them is made once, not in every call.

    Without it a call computes with the weights as they are, however they were changed. Inside, whoever may
    change them is stopped. An optimizer's step, ``load_state_dict``, ``train()`` and ``.to()`` raise at once
    (the last three of a module around it may have done their work on others of its parts by then). Other
    parameters in their place, and writes that torch counts, raise in the next call of the ``triton`` and
    ``native`` backends and of graphs; the others read the weights anyway. Writes that torch does not count
    (``.data``, NumPy, other processes, tensors made in inference mode) are what the promise is about. It
    holds in the whole process.

    Args:
        module: A network of this package, or a module that holds some, in evaluation mode.

    Raises:
        ValueError: There is no network of this package in it, or one is in training mode.
        FrozenError: Inside: something would change the weights, or has changed them.

    Example:
        >>> with torch.no_grad(), frozen(net):
        ...     answers = [net(x) for x in questions]
    """
    return Frozen(module)


def matrices(
    net: nn.Module, parameters: Sequence[Tensor], form: Hashable, make: Callable[[], list[Tensor]]
) -> list[Tensor] | None:
    """What ``make`` makes of the weights of ``net``, once while it is frozen; None where it is not.

    Args:
        parameters: The weights that it is made of.
        form: What is made of them.

    Raises:
        FrozenError: The weights are not those, or not as, they were when they were frozen.
    """
    promise = _promise(net)
    return None if promise is None else promise.matrices(net, parameters, form, make)


def number(net: nn.Module, weights: Iterable[Tensor] | None = None) -> int:
    """Which promise covers ``net``; 0 for none. A number is never used again.

    Args:
        weights: Its parameters, if the caller has them: to find them takes a walk through its modules.

    Raises:
        FrozenError: As for :func:`matrices`.
    """
    promise = _promise(net)
    if promise is None:
        return 0
    promise.check(net.parameters() if weights is None else weights)
    return promise.number


class _Reading:
    """What a capture may read of frozen networks, and what it read."""

    def __init__(self, promises: frozenset[int]) -> None:
        self.promises = promises
        self.tensors: list[Tensor] = []


_local = threading.local()
_NOTHING = _Reading(frozenset())


@contextmanager
def read_in_captures(promises: Iterable[int]) -> Iterator[list[Tensor]]:
    """Inside, captures of this thread may read what was made under the promises of these numbers.

    Whoever replays the graph must do so under the same promises alone, and hold the tensors that it is given.
    """
    before = getattr(_local, "reading", _NOTHING)
    _local.reading = reading = _Reading(frozenset(promises))
    try:
        yield reading.tensors
    finally:
        _local.reading = before


def forget() -> None:
    """Give the memory of weights that the ``native`` backend keeps packed back; no result depends on it."""
    native_weights.forget()


def _promise(net: nn.Module) -> Frozen | None:
    found = _promises.get(net) if _promises else None
    return found[0] if found else None


class Freezable(nn.Module):
    """A network that can be frozen: what may come with other weights raises meanwhile."""

    def train(self, mode: bool = True) -> Self:
        """See :meth:`torch.nn.Module.train`; raises FrozenError inside :func:`frozen`."""
        if mode:
            self._refuse("train()")
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # .to(), .half(), .cuda(), share_memory()
        self._refuse("moving or casting it")
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("load_state_dict()")
        super()._load_from_state_dict(*args, **kwargs)

    def _refuse(self, what: str) -> None:
        if _promise(self) is not None:
            raise FrozenError(f"{what} would change a frozen network: {_REMEDY}")


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _place(weight: Tensor) -> tuple[Hashable, ...]:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _version(weight: Tensor) -> int | None:
    # Tensors made in inference mode count no versions.
    return None if weight.is_inference() else weight._version
