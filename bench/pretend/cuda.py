"""``torch.cuda`` for a simulated device, whose tensors are ``meta`` tensors that report ``cuda:0``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
NAME = "pretended H100"
CAPABILITY = (9, 0)
MEMORY = 80 * 10**9

_META = torch.device("meta")
_is_meta = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


def _made_up(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor's data on the host: ones, or zeros in float64, which is only used for differences."""
    dtype = dtype or tensor.dtype
    return torch.full(tensor.shape, 0 if dtype == torch.float64 else 1, dtype=dtype)


def _unique(tensor: Tensor, *_: Any, return_inverse: bool = False, **__: Any) -> Any:
    """Assume that all elements differ, since their number determines the shape of the result."""
    flat = tensor.flatten()
    return (flat, torch.arange(len(flat), device=_META).view(tensor.shape)) if return_inverse else flat


#: Replacements of functions that read a tensor without data.
_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: lambda tensor: DEVICE,
    torch.Tensor.is_cuda.__get__: lambda tensor: True,  # type: ignore[attr-defined]
    _is_meta: lambda tensor: False,
    torch.Tensor.get_device: lambda tensor: 0,
    torch.Tensor.data_ptr: lambda tensor: 0,
    torch.Tensor.record_stream: lambda tensor, stream: None,
    torch.Tensor.cuda: lambda tensor, *_, **__: tensor,
    torch.Tensor.cpu: lambda tensor, **_: _made_up(tensor),
    torch.Tensor.numpy: lambda tensor, **_: _made_up(tensor).numpy(),
    torch.Tensor.tolist: lambda tensor: _made_up(tensor).tolist(),
    torch.Tensor.item: lambda tensor: _made_up(tensor).flatten()[0].item(),
    torch.Tensor.__float__: lambda tensor: float(tensor.dtype != torch.float64),
    torch.Tensor.__int__: lambda tensor: 1,
    torch.Tensor.__index__: lambda tensor: 1,
    torch.Tensor.__bool__: lambda tensor: True,
    torch.Tensor.unique: _unique,
    torch.unique: _unique,
    torch.Tensor.equal: lambda one, other: True,
    torch.equal: lambda one, other: True,
    torch.allclose: lambda *_, **__: True,
}


def _is_on(argument: Any, kind: str) -> bool:
    if isinstance(argument, torch.device):
        return argument.type == kind
    return isinstance(argument, str) and argument.partition(":")[0] == kind


class Pretence(TorchFunctionMode):
    """Maps ``cuda`` to the ``meta`` device, whose tensors report that they are on ``cuda:0``."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first: Any = args[0] if args else None
        absent = isinstance(first, Tensor) and _is_meta(first)
        if absent and func in _ANSWERS:
            return _ANSWERS[func](*args, **kwargs)
        if func is torch.Tensor.to and absent and _goes_home(args, kwargs):
            dtypes = (a.dtype if isinstance(a, Tensor) else a for a in (*args[1:], kwargs.get("dtype")))
            dtype = next((found for found in dtypes if isinstance(found, torch.dtype)), first.dtype)
            return _made_up(first, dtype)
        if func is torch.Tensor.copy_ and not absent and _is_meta(args[1]):
            return first.fill_(1)
        if func in (torch._fused_adam_, torch._fused_adamw_) and _is_meta(args[0][0]):
            return None  # they have no meta kernel, and return nothing
        if func is torch.Tensor.pin_memory:
            return first
        if func is torch.Tensor.cuda:
            return first.to(_META)
        kwargs.pop("pin_memory", None)
        # In most functions a bare string is not a device, but selects autocast or a backend.
        named = func is torch.Tensor.to
        args = tuple(
            _META if _is_on(a, "cuda") and (named or isinstance(a, torch.device)) else a for a in args
        )
        return func(*args, **_moved(kwargs))


def _goes_home(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``Tensor.to`` requests a copy on the host."""
    other = args[1] if len(args) > 1 else None
    if isinstance(other, Tensor):
        return not _is_meta(other)
    return _is_on(other, "cpu") or _is_on(kwargs.get("device"), "cpu")


def _moved(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with a CUDA device replaced by the ``meta`` device."""
    device = kwargs.get("device")
    return kwargs | {"device": _META} if _is_on(device, "cuda") else kwargs


class _Stream:
    """A stream that never waits."""

    cuda_stream = stream_id = 0
    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in ("wait_stream", "wait_event", "synchronize"):
            return lambda *_, **__: None
        raise AttributeError(name)

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    """An event that has always completed, one millisecond after any other."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


class _Graph:
    """A graph whose replay does nothing, since its tensors have no data."""

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def pool(self) -> tuple[int, int]:
        return 0, 0


_capturing = 0


@contextlib.contextmanager
def _graph(*_: Any, **__: Any) -> Iterator[None]:
    global _capturing
    _capturing += 1
    try:
        yield
    finally:
        _capturing -= 1


class _Generator:
    """The device's random number generator."""

    def get_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, state: Tensor) -> None:
        pass


def _does_nothing() -> Callable[..., None]:
    return lambda *_, **__: None  # a new function each time: torch.compile's tables reject duplicates


def _within() -> Callable[..., contextlib.AbstractContextManager[None]]:
    return lambda *_, **__: contextlib.nullcontext()


_PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    total_memory=MEMORY,
)

_REPLACED: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "is_current_stream_capturing": lambda: _capturing > 0,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: NAME,
    "get_device_capability": lambda *_: CAPABILITY,
    "get_device_properties": lambda *_: _PROPERTIES,
    "mem_get_info": lambda *_: (MEMORY, MEMORY),
    "memory_allocated": lambda *_: 0,
    "memory_reserved": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "max_memory_reserved": lambda *_: 0,
    "current_stream": lambda *_: _Stream(),
    "default_stream": lambda *_: _Stream(),
    "graph_pool_handle": lambda: (0, 0),
    "default_generators": (_Generator(),),
    "get_rng_state": lambda *_: _Generator().get_state(),
    "Stream": _Stream,
    "Event": _Event,
    "CUDAGraph": _Graph,
    "graph": _graph,
    **{name: _within() for name in ("stream", "device", "device_of")},
    **{
        name: _does_nothing()
        for name in (
            "init",
            "_lazy_init",
            "synchronize",
            "empty_cache",
            "reset_peak_memory_stats",
            "set_device",
            "manual_seed",
            "manual_seed_all",
            "set_rng_state",
            "ipc_collect",
        )
    },
}


def _inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` in the mode, which is disabled while one of its own functions runs."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Pretence():
            return function(*args, **kwargs)

    return call


def install() -> None:
    """Replace CUDA by the simulated device, permanently in this process and before any op is defined."""
    for name, value in _REPLACED.items():
        setattr(torch.cuda, name, value)
    engine: Any = torch.autograd
    engine._engine_run_backward = _inside(engine._engine_run_backward)
    # torch.compile of plain PyTorch launches none of the project's kernels.
    setattr(torch, "compile", lambda function=None, **_: function or (lambda inner: inner))  # noqa: B010
    # It samples until all values are in range, which never happens without data.
    torch.nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor
    for check in ("_device_has_foreach_support", "_has_foreach_support"):
        setattr(torch.nn.utils.clip_grad, check, lambda *_: True)
    Pretence().__enter__()

    from trm_kernels.ops import _library

    define = _library.define

    def define_without_fake(
        name: str, schema: str, implementation: Any, fake: Any, differentiable: Any = None
    ) -> Any:
        # An op's fake implementation would handle tensors without data, and launch nothing.
        runs = _inside(implementation)
        return define(name, schema, runs, runs, differentiable)

    _library.define = define_without_fake
