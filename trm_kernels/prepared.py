"""The matrices that the kernels read, kept between calls for inference.

Folding a norm's weight into a matrix is worth a kernel a call in training, where weights change with every
step. In inference it is done once, and done again when something may have changed the weights: an optimizer's
step, ``load_state_dict``, ``train()`` and ``eval()``, ``.to()``, another data pointer, another version.
``Tensor._version`` alone is no guide: fused optimizers, writes through ``.data`` and graph replays leave it
as it is; nor is the pointer: ``net.half().float()`` may end where it began. None of these sees a write
through ``.data`` in evaluation mode: call :func:`forget` after one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from trm_kernels.streams import Shared

Key = tuple[Any, ...]

#: For each module, by the first entry of the key, so that calls of two precisions may take turns.
_kept: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Key, Shared]]] = WeakKeyDictionary()
_changes = 0
_watching = False


def forget(*_: object) -> None:
    """Drop everything that is kept, in this process: the weights have changed."""
    global _changes
    _changes += 1
    _kept.clear()


def _watch() -> None:
    """Let every optimizer's step, whosever parameters it changes, drop what is kept."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(forget)
        _watching = True


def key_of(parameters: Sequence[Tensor], form: Hashable) -> Key:
    """What the matrices depend on, as far as it can be seen; ``form``: their dtype, or what else they are."""
    return (form, _changes, *((parameter.data_ptr(), _version(parameter)) for parameter in parameters))


def _version(parameter: Tensor) -> object:
    # Tensors made in inference mode count no versions: they equal nothing, themselves included.
    return object() if parameter.is_inference() else parameter._version


def recall(module: nn.Module, key: Key) -> list[Tensor] | None:
    """The matrices kept for ``module``, if nothing has changed since; on any stream, but in no capture."""
    found = _kept.get(module, {}).get(key[0])
    return found[1].read() if found is not None and found[0] == key else None


def keep(module: nn.Module, key: Key, matrices: list[Tensor]) -> None:
    """Keep the matrices of ``module``, made on the current stream, until something changes."""
    _watch()
    _kept.setdefault(module, {})[key[0]] = key, Shared(matrices)
