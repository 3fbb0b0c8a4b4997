"""Tests that the smoke test of ``python -m bench.gpu`` passes correct kernels and fails wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu import smoke
from bench.gpu.smoke import CHECKS, Setting, Sizes
from trm_kernels import recursion

pytestmark = pytest.mark.interpreter


@pytest.fixture
def setting(device: str) -> Setting:
    sizes = Sizes(batch=2, length=6, width=32, heads=2, n=1, T=2)
    return Setting(torch.device(device), sizes, repeats=2, steps=2)


@pytest.mark.filterwarnings("ignore:running without a CUDA graph")
@pytest.mark.parametrize("name", CHECKS)
def test_correct_kernels_pass(name: str, setting: Setting) -> None:
    assert CHECKS[name](setting)


def replace_recursion(monkeypatch: pytest.MonkeyPatch, deep_recursion: Any) -> None:
    """Replace it everywhere that checks call it, including latent recursions."""
    for place in (smoke, recursion):
        monkeypatch.setattr(place, "deep_recursion", deep_recursion)


def _spoilt(function: Any, spoil: Any) -> Any:
    """``function`` with modified tensors."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return tuple(spoil(t) if isinstance(t, Tensor) else t for t in function(*args, **kwargs))

    return call


@pytest.mark.parametrize("name", ["seed", "inference", "fp8"])
def test_wrong_result_fails(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(real: Any) -> Any:
        spoilt = _spoilt(real, lambda tensor: tensor * 1.05)

        def call(net: Any, *args: Any, **kwargs: Any) -> Any:
            ours = getattr(net, "backend", None) == "triton"
            return (spoilt if ours else real)(net, *args, **kwargs)

        return call

    replace_recursion(monkeypatch, off(smoke.deep_recursion))
    with pytest.raises(AssertionError):
        CHECKS[name](setting)


@pytest.mark.parametrize("name", ["graph", "repeats", "dropout"])
@pytest.mark.filterwarnings("ignore:running without a CUDA graph")
def test_non_deterministic_result_fails(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = smoke.deep_recursion, [0]

    def moving(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return _spoilt(real, lambda t: t + 1e-2 * calls[0])(*args, **kwargs)

    replace_recursion(monkeypatch, moving)
    with pytest.raises(AssertionError):
        CHECKS[name](setting)


def test_missing_gradient_fails(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    real = smoke.deep_recursion

    def cut(net: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return real(net, x.detach(), *args, **kwargs)

    replace_recursion(monkeypatch, cut)
    with pytest.raises(AssertionError, match="no gradient of x"):
        CHECKS["seed"](setting)
