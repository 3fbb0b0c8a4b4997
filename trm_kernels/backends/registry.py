"""What can run a network: one record for each backend, as it registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from trm_kernels.config import Memory
from trm_kernels.packing import Packing

if TYPE_CHECKING:
    from trm_kernels.module import FusedModule

Refusal = str | None
Normalisation = Callable[[Tensor], Tensor]

#: How recursions may deviate from the precision of their states.
Precision = Literal["fp8-nograd"]

#: In ``Backend.auto``: on every type of device that no other backend names.
ANYWHERE = "*"


class Recursion(NamedTuple):
    """What is asked of a recursion, beside its network and states: :func:`~trm_kernels.deep_recursion`."""

    n: int
    T: int = 1
    mask: Tensor | Packing | None = None
    output_norm: Normalisation | None = None
    with_gradients: bool = True
    memory: Memory = "balanced"
    precision: Precision | None = None
    read: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """Which positions are valid [B, L], or None: all are."""
        return self.mask.mask if isinstance(self.mask, Packing) else self.mask


#: Runs a recursion over a network on states x, y and z [B, L, D] of one shape and dtype; gives y and z.
RunRecursion = Callable[["FusedModule", Sequence[Tensor], Recursion], tuple[Tensor, Tensor]]
RefusesRecursion = Callable[["FusedModule", Sequence[Tensor], Recursion], Refusal]


def _never_slower(net: FusedModule, x: Tensor) -> Refusal:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run a :class:`~trm_kernels.module.FusedModule`.

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
        refuses: Why a recursion over a network that the backend serves must call it step by step, or None.
        run: Runs one that is not refused.
    """

    refuses: RefusesRecursion
    run: RunRecursion


@dataclass(frozen=True)
class PackedRecursion:
    """A recursion that calls the network step by step, but on the valid positions alone.

    Attributes:
        refuses: Why a recursion with a mask must run on the padded batch, or None.
        run: Runs one that is not refused.
    """

    refuses: RefusesRecursion
    run: RunRecursion


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
