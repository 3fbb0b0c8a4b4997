"""Implementations of a network and its recursion. Each declares which calls it cannot handle.

To add one, write a module with a :class:`Backend` and register it below, in order of increasing speed.
"""

from trm_kernels.backends import compiled, eager, fused, native
from trm_kernels.backends.choice import (
    BackendError,
    Selection,
    refusal,
    requested,
    run,
    select,
    use_backend,
    validate_name,
)
from trm_kernels.backends.registry import (
    AUTO_ORDER,
    BACKENDS,
    Backend,
    FusedRecursion,
    PackedRecursion,
    Recursion,
    Refusal,
    register,
)

for _backend in (eager.BACKEND, compiled.BACKEND, fused.BACKEND, native.BACKEND):
    register(_backend)

__all__ = [
    "AUTO_ORDER",
    "BACKENDS",
    "Backend",
    "BackendError",
    "FusedRecursion",
    "PackedRecursion",
    "Recursion",
    "Refusal",
    "Selection",
    "refusal",
    "register",
    "requested",
    "run",
    "select",
    "use_backend",
    "validate_name",
]
