"""What can run a network: one record for each backend, as it registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from trm_kernels.module import FusedModule
    from trm_kernels.packing import Packing

Refusal = str | None

#: In ``Backend.auto``: on every type of device that no other backend names.
ANYWHERE = "*"


def _never_slower(net: FusedModule, x: Tensor) -> Refusal:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run a :class:`~trm_kernels.network.FusedModule`.

    Attributes:
        name: What users write.
        summary: One line for ``llm-trm env``.
        unavailable: Why it cannot work in this process at all, or None.
        refuses: Why it cannot serve this call (network, input [B, L, D], mask [B, L]), or None.
        run: Runs the network on an input and mask that it does not refuse.
        recursion: Where it can run a whole recursion at once.
        packed: Where it can leave out padding, which one of the former does by itself.
        slower: Why the next backend would be faster for this call, or None. Only ``auto`` asks.
        auto: Types of device on which ``auto`` tries it, before all that registered earlier.
    """

    name: str
    summary: str
    unavailable: Callable[[], Refusal]
    refuses: Callable[[FusedModule, Tensor, Tensor | None], Refusal]
    run: Callable[[FusedModule, Tensor, Tensor | None], Tensor]
    recursion: FusedRecursion | None = None
    packed: PackedRecursion | None = None
    slower: Callable[[FusedModule, Tensor], Refusal] = _never_slower
    auto: tuple[str, ...] = ()


@dataclass(frozen=True)
class FusedRecursion:
    """A backend's own recursion.

    Attributes:
        refuses: Why a recursion over a network that the backend serves must call it step by step, or None:
            network, states [B, L, D], what is applied after every call, and the precision asked for.
        run: ``run(net, x, y, z, n, T=, ...)``, with all arguments of
            :func:`~trm_kernels.recursion.deep_recursion`, on states of one shape and dtype.
    """

    refuses: Callable[[FusedModule, Sequence[Tensor], object, str | None], Refusal]
    run: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PackedRecursion:
    """A recursion that calls the network step by step, but on the valid positions alone.

    Attributes:
        refuses: Why a recursion must run on the padded batch, or None: network, states [B, L, D], mask.
        run: As for :class:`FusedRecursion`.
    """

    refuses: Callable[[FusedModule, Sequence[Tensor], Tensor | Packing], Refusal]
    run: Callable[..., tuple[Tensor, Tensor]]


#: By name.
BACKENDS: dict[str, Backend] = {}

#: What ``auto`` tries, by type of device.
AUTO_ORDER: dict[str, tuple[str, ...]] = {}


def register(backend: Backend) -> None:
    """Offer a backend under its name.

    Raises:
        ValueError: The name is taken, or stands for the choice among all of them.
    """
    if backend.name in BACKENDS or backend.name == "auto":
        raise ValueError(f"there is a backend {backend.name!r} already")
    BACKENDS[backend.name] = backend
    for device in backend.auto:
        AUTO_ORDER[device] = backend.name, *(AUTO_ORDER.get(device) or AUTO_ORDER.get(ANYWHERE, ()))
