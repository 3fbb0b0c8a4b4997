"""Records calls of launchers without their tensors, to repeat them elsewhere."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trm_kernels.ops.tiles import Problem


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements in the storage."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def bytes(self) -> int:
        """Size of the storage in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class InstanceSpec:
    """An object that a method was called on."""

    type: type
    attributes: dict[str, Any]


def describe(value: Any) -> Any:
    """``value`` with every tensor replaced by its specification."""
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(describe(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: describe(getattr(value, field.name)) for field in fields(value)})
    if _has_methods(value):
        return InstanceSpec(type(value), {name: describe(item) for name, item in vars(value).items()})
    return value


def build(value: Any, make: Callable[[TensorSpec], Tensor]) -> Any:
    """The inverse of :func:`describe`, with tensors from ``make``."""
    if isinstance(value, TensorSpec):
        return make(value)
    if isinstance(value, (tuple, list)):
        return type(value)(build(item, make) for item in value)
    if isinstance(value, InstanceSpec):
        instance: Any = object.__new__(value.type)
        instance.__dict__.update({name: build(item, make) for name, item in value.attributes.items()})
        return instance
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: build(getattr(value, f.name), make) for f in fields(value)})
    return value


def fresh(value: Any) -> Any:
    """A shallow copy of an instance with the same tensors, since a method may change its instance."""
    return copy.copy(value) if _has_methods(value) else value


def _has_methods(value: Any) -> bool:
    """Whether ``value`` is an instance of a class of this project (not an enum), as for method launchers."""
    new: Any = type(value).__new__
    return type(value).__module__.startswith("trm_kernels") and new is object.__new__


def empty(spec: TensorSpec) -> Tensor:
    """A tensor without data."""
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")


def random(spec: TensorSpec, device: torch.device) -> Tensor:
    """Random non-zero data: float32 uniform in [0, 1], since sums of squares are positive; others normal."""
    if spec.dtype.is_floating_point:
        flat = torch.empty(spec.elements, dtype=torch.float32, device=device)
        flat = (flat.uniform_() if spec.dtype == torch.float32 else flat.normal_()).to(spec.dtype)
    else:
        flat = torch.ones(spec.elements, dtype=spec.dtype, device=device)
    return flat.as_strided(spec.shape, spec.stride)


@dataclass(frozen=True)
class RecordedCall:
    """A call of a launcher, which solves one problem.

    Attributes:
        problem: The problem.
        module: Module of the launcher.
        name: Qualified name of the launcher in the module.
        args: Positional arguments from :func:`describe`.
        kwargs: Keyword arguments from :func:`describe`.
    """

    problem: Problem
    module: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[TensorSpec]:
        """Specifications of the call's tensors."""
        found: list[TensorSpec] = []

        def collect(spec: TensorSpec) -> Tensor:
            found.append(spec)
            return empty(spec)

        build((self.args, tuple(self.kwargs.values())), collect)
        return found

    @property
    def bytes(self) -> int:
        """Size of the call's tensors in bytes."""
        return sum(spec.bytes for spec in self.tensors)

    def prepare(self, make: Callable[[TensorSpec], Tensor]) -> Callable[[], object]:
        """The call with tensors from ``make``; it can be repeated."""
        launcher: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            launcher = getattr(launcher, part)
        args = build(self.args, make)
        kwargs = {name: build(value, make) for name, value in self.kwargs.items()}
        # Include the later summation of partial sums, which is part of the cost of splitting.
        summed = self.problem.kernel == "weight_gradient"

        def call() -> object:
            mine = tuple(fresh(arg) for arg in args)
            out = launcher(*mine, **kwargs)
            return mine[0].total if summed else out

        return call


def input_sets(call: RecordedCall, cache_bytes: int) -> int:
    """Number of input sets that do not fit together in a cache of ``cache_bytes``; at most 16."""
    return max(1, min(16, math.ceil(2 * cache_bytes / max(call.bytes, 1))))
