"""Weights that the ``native`` backend keeps packed between calls, while every bit of them stays the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from trm_kernels import native_module

Digest = tuple[Hashable, ...]

#: For each network, by form, so that calls of two precisions may take turns.
_kept: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Digest, Tensor]]] = WeakKeyDictionary()

#: Bytes of weights for which a further thread is worth its start: a pass takes 6 us a thread for them.
_FEWEST_BYTES = 1 << 19


def recall(
    net: nn.Module,
    parameters: Sequence[Tensor],
    form: Hashable,
    kernels: Any,
    pack: Callable[[], Tensor],
) -> Tensor:
    """The packed weights of ``net``: those of the last call where nothing has changed, else ``pack()``.

    Nothing but the weights themselves tells whether they have changed, so every call reads them all, at the
    speed of memory.

    Args:
        parameters: The weights that are packed.
        form: What they are packed for.
        kernels: The network of ``trm_kernels._native``.
    """
    digest = _digest(parameters, kernels)
    if digest is None:
        return pack()
    kept = _kept.setdefault(net, {})
    found = kept.get(form)
    if found is not None and found[0] == digest:
        return found[1]
    # Dropped first, so that the new ones may take their memory.
    del found
    kept.pop(form, None)
    packed = pack()
    # Someone may have written to the weights meanwhile: then this is what they were, and not what to keep.
    if _digest(parameters, kernels) == digest:
        kept[form] = digest, packed
    return packed


def forget() -> None:
    """Give the memory of all packed weights back."""
    _kept.clear()


def _digest(parameters: Sequence[Tensor], kernels: Any) -> Digest | None:
    """What the weights are, in two numbers of 64 bits; None where they do not lie in one piece each."""
    # Held: another thread may give a parameter other memory, and free this.
    held = [weight.detach() for weight in parameters]
    if any(not weight.is_contiguous() or weight.is_neg() for weight in held):
        return None
    sizes = [weight.nbytes for weight in held]
    threads = native_module.threads(sum(sizes), _FEWEST_BYTES)
    addresses = [weight.data_ptr() for weight in held]
    kinds = [(weight.dtype, weight.shape) for weight in held]
    return (*kernels.digest(addresses, sizes, threads), *kinds)
