"""Backend selection by argument, context, environment and auto, and the reported reasons."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trm_kernels import BackendError, TinyRecursiveNetwork, TransformerBlock, backends, use_backend
from trm_kernels.backends import choice, compiled

X = torch.randn(2, 5, 32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Replace every backend by one that accepts all calls, computes eagerly and records its name."""
    ran: list[str] = []

    def note(name: str) -> backends.Backend:
        def run(net: object, x: Tensor, mask: Tensor | None) -> Tensor:
            ran.append(name)
            return net.forward_eager(x, mask)  # type: ignore[attr-defined]

        return replace(backends.BACKENDS[name], run=run, unavailable=lambda: None, refuses=lambda *_: None)

    for name in backends.BACKENDS:
        monkeypatch.setitem(backends.BACKENDS, name, note(name))
    monkeypatch.setattr(choice, "_ENVIRONMENT", "auto")
    yield ran


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, reason: str, available: bool = True) -> None:
    refusing = replace(
        backends.BACKENDS[name],
        unavailable=lambda: None if available else reason,
        refuses=lambda *_: reason,
    )
    monkeypatch.setitem(backends.BACKENDS, name, refusing)


def network(backend: str | None = None) -> TinyRecursiveNetwork:
    return TinyRecursiveNetwork(32, 1, 4, backend=backend)


def test_the_choice_with_the_highest_precedence_wins(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_ENVIRONMENT", "compile")
    network()(X)
    with use_backend("triton"):
        network()(X)
        network("eager")(X)
        with use_backend("native"):
            network()(X)
        network()(X)
    network()(X)
    assert calls == ["compile", "triton", "eager", "native", "triton", "compile"]


def test_the_context_ends_with_an_exception(calls: list[str]) -> None:
    with pytest.raises(RuntimeError, match="inside"), use_backend("triton"):
        raise RuntimeError("inside")
    network("eager")(X)
    assert backends.requested() == "auto"


def test_the_context_reaches_other_threads(calls: list[str]) -> None:
    """The recomputation of a checkpoint runs on autograd's threads."""
    with use_backend("triton"):
        thread = threading.Thread(target=lambda: network()(X))
        thread.start()
        thread.join()
    assert calls == ["triton"]


def test_an_explicit_auto_overrides_the_context(calls: list[str]) -> None:
    with use_backend("compile"):
        network("auto")(X)
    assert calls == [backends.AUTO_ORDER["cpu"][0]]


def test_blocks_choose_as_networks_do(calls: list[str]) -> None:
    TransformerBlock(32, 4, backend="triton")(X)
    with use_backend("compile"):
        TransformerBlock(32, 4)(X)
    assert calls == ["triton", "compile"]


def test_auto_uses_the_next_backend_and_reports_why(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", ("native", "triton", "eager"))
    refuse(monkeypatch, "native", "no compiler", available=False)
    refuse(monkeypatch, "triton", "odd head size")
    net = network()
    selection = net.selected_backend(X)
    assert selection.name == "eager"
    assert selection.passed_over == {"native": "no compiler", "triton": "odd head size"}
    net(X)
    assert calls == ["eager"]


@pytest.mark.parametrize("available", [False, True])
def test_a_forced_backend_that_refuses_raises(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    refuse(monkeypatch, "triton", "the moon is full", available)
    for choose in (lambda: network("triton")(X), lambda: network("triton").selected_backend(X)):
        with pytest.raises(BackendError, match="'triton' cannot handle this call: the moon is full"):
            choose()
    with use_backend("triton"), pytest.raises(BackendError, match="the moon is full"):
        network()(X)
    assert calls == []


@pytest.mark.parametrize("name", ["Eager", "cuda", "", "cutlass"])
def test_unknown_names(name: str) -> None:
    message = f"unknown backend {name!r}: choose from auto, eager, compile, triton, native"
    with pytest.raises(ValueError, match=message):
        network(name)
    with pytest.raises(ValueError, match=message):
        TransformerBlock(32, 4, backend=name)
    with pytest.raises(ValueError, match=message), use_backend(name):
        pass


def test_every_backend_runs_or_reports_why_not() -> None:
    net = network()
    for name in backends.BACKENDS:
        reason = backends.refusal(name, net, X)
        assert reason is None or (len(reason) > 10 and "\n" not in reason), name


def test_compile_needs_a_compiler_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert "neither g++ nor clang++" in (backends.refusal("compile", network(), X) or "")
    assert backends.refusal("compile", network(), X[:0]) is not None


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "TRM_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_environment_chooses_and_is_checked() -> None:
    code = (
        "import sys, torch, trm_kernels as t\n"
        "net = t.TinyRecursiveNetwork(32, 1, 4)\n"
        "print(t.backends.requested(), 'triton' in sys.modules)\n"
        "print(net.selected_backend(torch.randn(1, 3, 32)).name)\n"
    )
    chosen = run_python(code, TRM_BACKEND="compile")
    assert chosen.stdout.split() == ["compile", "False", "compile"], chosen.stderr
    wrong = run_python(code, TRM_BACKEND="cutlass")
    assert wrong.returncode != 0
    assert "ValueError: TRM_BACKEND: unknown backend 'cutlass'" in wrong.stderr


def test_importing_needs_only_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('triton', 'numpy', 'click', 'rich', 'llm_trm', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import torch, trm_kernels\n"
        "net = trm_kernels.TinyRecursiveNetwork(32, 1, 4)\n"
        "trm_kernels.patch(torch.nn.Sequential(net))\n"
        "net(torch.randn(1, 3, 32)).sum().backward()\n"
        "print(net.selected_backend(torch.randn(1, 3, 32)).passed_over)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_custom_backend_precedes_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, order in dict(backends.AUTO_ORDER).items():
        monkeypatch.setitem(backends.AUTO_ORDER, device, order)
    # Set and deleted, so that monkeypatch removes it after the test.
    monkeypatch.setitem(backends.BACKENDS, "mine", backends.BACKENDS["eager"])
    monkeypatch.delitem(backends.BACKENDS, "mine")
    mine = backends.Backend(
        "mine", "", lambda: None, lambda net, x, mask: None, lambda net, x, mask: x + 1.0, auto=("cpu",)
    )
    backends.register(mine)
    assert backends.AUTO_ORDER["cpu"] == ("mine", "native", "eager")
    assert torch.equal(network()(X), X + 1.0) and torch.equal(network("mine")(X), X + 1.0)
    with pytest.raises(ValueError, match="backend 'mine' already exists"):
        backends.register(mine)
    with pytest.raises(ValueError, match="'auto'"):
        backends.register(replace(mine, name="auto"))
