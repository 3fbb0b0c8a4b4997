"""Matrices that kernels derive from weights, prepared once for all calls of a network declared frozen.

Otherwise, every call computes with the current weights. No pointer, version or hook detects every write to
them (``.data``, NumPy views, other processes, third-party kernels), so the caller must declare them frozen.
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
    """Something changed weights that were declared frozen, or tried to."""


_REMEDY = "do it outside trm_kernels.frozen(), or without frozen=True"

#: The open freezes of each network; the first one applies. Neither they nor their matrices hold a strong
#: reference to the network, so a freeze that the network itself holds is freed with it.
_freezes: WeakKeyDictionary[nn.Module, list[Frozen]] = WeakKeyDictionary()
_ids = count(1)
_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # A thread that does not exist in the child may have held the lock.
    os.register_at_fork(after_in_child=_new_lock)


class Frozen:
    """Declares the weights of the networks inside ``modules`` constant, in a ``with`` block or until closed.

    Args:
        modules: Networks of this package, or modules that contain some, in evaluation mode.

    Raises:
        ValueError: If they contain no network of this package, or one in training mode.
    """

    def __init__(self, *modules: nn.Module) -> None:
        inner = {net: None for module in modules for net in module.modules()}
        networks = [net for net in inner if isinstance(net, Freezable)]
        if not networks:
            kinds = ", ".join(type(module).__name__ for module in modules) or "module"
            raise ValueError(f"nothing to freeze: this {kinds} contains no network of trm_kernels")
        if any(net.training for net in networks):
            raise ValueError("a network in training mode cannot be frozen: call eval() first")
        #: Part of the keys of graphs, which read the matrices at fixed addresses.
        self.id = next(_ids)
        # Keep the tensors alive, and their memory too in case `.data` is replaced, so that no other tensor
        # can get their ids or addresses.
        self._weights = {
            id(weight): (weight, weight.detach(), _layout(weight), _version(weight))
            for net in networks
            for weight in net.parameters()
        }
        self._cache: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[list[int], Shared]]] = (
            WeakKeyDictionary((net, {}) for net in networks)
        )
        self._hook: Any = None

    def open(self) -> Frozen:
        """Start the freeze. It cannot be opened twice at the same time."""
        if self._hook is not None:
            raise RuntimeError("this freeze is already open: create another one with trm_kernels.frozen()")
        with _lock:
            for net in self._cache:
                _freezes.setdefault(net, []).append(self)
            self._hook = register_optimizer_step_pre_hook(self._refuse_step)
        return self

    def close(self) -> None:
        """End the freeze and drop its matrices."""
        with _lock:
            if self._hook is None:
                return
            self._hook.remove()
            self._hook = None
            for net, made in self._cache.items():
                made.clear()
                _freezes[net].remove(self)
                if not _freezes[net]:
                    del _freezes[net]

    def __enter__(self) -> None:
        self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def matrices(
        self, net: nn.Module, parameters: Sequence[Tensor], form: Hashable, make: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """Implement :func:`matrices` for a network that this freeze covers."""
        self.check(parameters)
        capturing = _is_capturing(parameters[0])
        reading: _Reading = getattr(_local, "reading", _NOTHING)
        if capturing and self.id not in reading.freeze_ids:
            return make()  # the capturing code does not know of this freeze and may replay after its end
        ids = [*map(id, parameters)]
        with _lock:
            found = self._cache[net].get(form)
            if found is None:
                if capturing:
                    return make()  # in the graph's memory, recomputed by every replay
                # Tensors created in inference mode cannot be saved for a later backward.
                with torch.inference_mode(False), torch.no_grad():
                    found = self._cache[net][form] = ids, Shared(make())
        if found[0] != ids:
            raise FrozenError(f"the order of a frozen network's weights has changed: {_REMEDY}")
        if not capturing:
            return found[1].read()
        # No need to wait for the matrices: a capture starts only when its device is idle.
        reading.tensors.extend(found[1].tensors)
        return found[1].tensors

    def check(self, weights: Iterable[Tensor]) -> None:
        """Raise FrozenError for weights that are not part of this freeze, or with a detected write."""
        for weight in weights:
            found = self._weights.get(id(weight))
            if found is None:
                raise FrozenError(f"the weights of a frozen network have been replaced: {_REMEDY}")
            _, _, layout, version = found
            if _layout(weight) != layout or _version(weight) != version:
                raise FrozenError(f"the weights of a frozen network have been modified: {_REMEDY}")

    def _refuse_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if any(id(weight) in self._weights for group in optimizer.param_groups for weight in group["params"]):
            raise FrozenError(f"an optimizer's step would change a frozen network: {_REMEDY}")


def frozen(module: nn.Module) -> Frozen:
    """Declare that weights stay constant, so that kernels prepare them once instead of in every call.

    Without it, every call computes with the current weights, however they were changed. Inside the ``with``
    block, changes raise :class:`FrozenError`. Optimizer steps, ``load_state_dict``, ``train()`` and ``.to()``
    raise immediately (the last three, called on an enclosing module, may already have changed its other
    parts). Replaced parameters, and writes that increment torch's version counter, raise in the next call of
    the ``triton`` and ``native`` backends and of graphs; the other backends always read the current weights.
    Writes that torch does not count (``.data``, NumPy, other processes, tensors created in inference mode)
    cannot be detected: the caller must not make them. The freeze applies to the whole process.

    Args:
        module: A network of this package, or a module that contains some, in evaluation mode.

    Raises:
        ValueError: If it contains no network of this package, or one in training mode.
        FrozenError: Inside the block, if something changes the weights or tries to.

    Example:
        >>> with torch.no_grad(), frozen(net):
        ...     answers = [net(x) for x in questions]
    """
    return Frozen(module)


def matrices(
    net: nn.Module, parameters: Sequence[Tensor], form: Hashable, make: Callable[[], list[Tensor]]
) -> list[Tensor] | None:
    """Return the cached result of ``make`` while ``net`` is frozen, or None if it is not frozen.

    Args:
        parameters: The weights from which ``make`` computes the matrices.
        form: Identifies the form of the matrices.

    Raises:
        FrozenError: If the weights were replaced or modified since they were frozen.
    """
    freeze = _freeze_of(net)
    return None if freeze is None else freeze.matrices(net, parameters, form, make)


def freeze_id(net: nn.Module, weights: Iterable[Tensor] | None = None) -> int:
    """Return the id of the freeze that covers ``net``, or 0 if it is not frozen. Ids are never reused.

    Args:
        weights: Its parameters, if the caller has them; this saves a walk through its modules.

    Raises:
        FrozenError: As for :func:`matrices`.
    """
    freeze = _freeze_of(net)
    if freeze is None:
        return 0
    freeze.check(net.parameters() if weights is None else weights)
    return freeze.id


class _Reading:
    """The freezes whose matrices a capture may read, and the matrices that it read."""

    def __init__(self, freeze_ids: frozenset[int]) -> None:
        self.freeze_ids = freeze_ids
        self.tensors: list[Tensor] = []


_local = threading.local()
_NOTHING = _Reading(frozenset())


@contextmanager
def read_in_captures(freeze_ids: Iterable[int]) -> Iterator[list[Tensor]]:
    """Allow captures of this thread to read the matrices of the given freezes.

    The caller must replay the graph only under the same freezes, and keep the yielded tensors alive.
    """
    before = getattr(_local, "reading", _NOTHING)
    _local.reading = reading = _Reading(frozenset(freeze_ids))
    try:
        yield reading.tensors
    finally:
        _local.reading = before


def forget() -> None:
    """Free the packed weights that the ``native`` backend caches. Results do not depend on it."""
    native_weights.forget()


def _freeze_of(net: nn.Module) -> Frozen | None:
    found = _freezes.get(net) if _freezes else None
    return found[0] if found else None


class Freezable(nn.Module):
    """A network that can be frozen. While it is, methods that may change its weights raise."""

    def train(self, mode: bool = True) -> Self:
        """See :meth:`torch.nn.Module.train`; raises FrozenError inside :func:`frozen`."""
        if mode:
            self._raise_if_frozen("train()")
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # .to(), .half(), .cuda(), share_memory()
        self._raise_if_frozen("moving or casting it")
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._raise_if_frozen("load_state_dict()")
        super()._load_from_state_dict(*args, **kwargs)

    def _raise_if_frozen(self, action: str) -> None:
        if _freeze_of(self) is not None:
            raise FrozenError(f"{action} would change a frozen network: {_REMEDY}")


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _layout(weight: Tensor) -> tuple[Hashable, ...]:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _version(weight: Tensor) -> int | None:
    # Tensors created in inference mode have no version counter.
    return None if weight.is_inference() else weight._version
