"""The registry of backends: one record per backend."""

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

#: Reduced precisions of recursions.
Precision = Literal["fp8-nograd"]

#: In ``Backend.auto``: every device type that no other backend lists.
ANYWHERE = "*"


class Recursion(NamedTuple):
    """Arguments of a recursion other than its network and states; see :func:`~trm_kernels.deep_recursion`."""

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
        """Mask of valid positions [B, L], or None if all are valid."""
        return self.mask.mask if isinstance(self.mask, Packing) else self.mask


#: Runs a recursion over a network on states x, y and z [B, L, D] of one shape and dtype; returns y and z.
RunRecursion = Callable[["FusedModule", Sequence[Tensor], Recursion], tuple[Tensor, Tensor]]
RefusesRecursion = Callable[["FusedModule", Sequence[Tensor], Recursion], Refusal]


def _never_slower(net: FusedModule, x: Tensor) -> Refusal:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run a :class:`~trm_kernels.module.FusedModule`.

    Attributes:
        name: Name of the backend in the user interface.
        summary: One line for ``llm-trm env``.
        unavailable: Returns why it cannot run in this process at all, or None.
        refuses: Returns why it cannot handle this call (network, input [B, L, D], mask [B, L]), or None.
        run: Runs the network on an input and mask that it does not refuse.
        recursion: Its fused recursion, if it has one. It handles padding itself.
        packed: Its recursion without padding, if it has one and no fused recursion.
        slower: Returns why the next backend would be faster for this call, or None. Only ``auto`` uses it.
        auto: Device types on which ``auto`` tries it, before all backends registered earlier.
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
    """A backend's fused recursion.

    Attributes:
        refuses: Returns why a recursion must call the network step by step, although the backend can run the
            network, or None.
        run: Runs a recursion that is not refused.
    """

    refuses: RefusesRecursion
    run: RunRecursion


@dataclass(frozen=True)
class PackedRecursion:
    """A recursion that calls the network step by step, but only on the valid positions.

    Attributes:
        refuses: Returns why a recursion with a mask must run on the padded batch, or None.
        run: Runs a recursion that is not refused.
    """

    refuses: RefusesRecursion
    run: RunRecursion


#: All backends by name.
BACKENDS: dict[str, Backend] = {}

#: Backends that ``auto`` tries, by device type.
AUTO_ORDER: dict[str, tuple[str, ...]] = {}


def register(backend: Backend) -> None:
    """Register a backend under its name.

    Raises:
        ValueError: If the name is taken or is ``"auto"``.
    """
    if backend.name in BACKENDS or backend.name == "auto":
        raise ValueError(f"backend {backend.name!r} already exists")
    BACKENDS[backend.name] = backend
    for device in backend.auto:
        AUTO_ORDER[device] = backend.name, *(AUTO_ORDER.get(device) or AUTO_ORDER.get(ANYWHERE, ()))
