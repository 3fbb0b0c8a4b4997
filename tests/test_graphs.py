"""Graphs: which calls share one, padding, eviction, and reported fallbacks."""

from __future__ import annotations

import gc
import json
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import trm_kernels
from llm_trm.cli import main
from tests.graph_double import RecordingCapturer
from trm_kernels import (
    GraphCache,
    GraphedFunction,
    GraphedRecursion,
    TinyRecursiveNetwork,
    deep_recursion,
    graph_status,
    graphed,
    graphs,
)
from trm_kernels.graphs import cache as cache_internals
from trm_kernels.graphs import capture as capture_internals
from trm_kernels.graphs import eighths, multiple_of, power_of_two


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_internals, "_WARNED", set())


def recorded(*nbytes: int, **bounds: int) -> tuple[GraphCache, RecordingCapturer]:
    capturer = RecordingCapturer(*nbytes)
    return GraphCache(capturer=capturer, **bounds), capturer  # type: ignore[arg-type]


def double(x: Tensor) -> Tensor:
    return 2 * x


def network(**options: object) -> TinyRecursiveNetwork:
    return TinyRecursiveNetwork(16, 1, 2, backend="eager", **options).eval()


def states(batch: int = 2, length: int = 8, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(3, batch, length, width).unbind())  # type: ignore[return-value]


# Calls that share a graph.


def test_a_second_call_of_the_same_kind_replays() -> None:
    cache, capturer = recorded()
    fast = GraphedFunction(double, cache=cache)
    for number in range(3):
        assert torch.equal(fast(torch.full((3,), float(number))), torch.full((3,), 2.0 * number))
    assert len(capturer.graphs) == 1 and capturer.graphs[0].replays == 3
    assert capturer.warmups == 2
    assert cache.status() == graphs.GraphStatus(graphs=1, captures=1, replays=3)


def test_shape_dtype_and_static_arguments_have_separate_graphs() -> None:
    cache, capturer = recorded()
    fast = GraphedFunction(lambda x, factor=1: factor * x, cache=cache)
    x = torch.ones(3)
    assert fast(x, factor=3).tolist() == [3.0] * 3
    assert fast(x, factor=True).tolist() == [1.0] * 3
    assert fast(x, factor=1).tolist() == [1.0] * 3
    assert fast(x.double(), factor=1).dtype == torch.float64
    assert fast(torch.ones(4), factor=1).shape == (4,)
    assert fast(torch.ones(3, 1), factor=1).shape == (3, 1)
    assert len(capturer.graphs) == 6


def test_an_optional_tensor_is_part_of_the_kind() -> None:
    cache, capturer = recorded()
    fast = GraphedFunction(lambda x, y: x if y is None else x + y, cache=cache)
    x = torch.ones(3)
    assert fast(x, None).tolist() == [1.0] * 3
    assert fast(x, x).tolist() == [2.0] * 3
    assert len(capturer.graphs) == 2


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.no_grad(),
        lambda: torch.inference_mode(),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: trm_kernels.use_backend("eager"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "backend"],
)
def test_ambient_state_is_part_of_the_kind(context: object) -> None:
    cache, capturer = recorded()
    fast = GraphedFunction(double, cache=cache)
    fast(torch.ones(3))
    with context():  # type: ignore[operator]
        fast(torch.ones(3))
        fast(torch.ones(3))
    fast(torch.ones(3))
    assert len(capturer.graphs) == 2


def test_matmul_precision_is_part_of_the_kind() -> None:
    cache, capturer = recorded()
    fast = GraphedFunction(double, cache=cache)
    before = torch.backends.cuda.matmul.fp32_precision
    fast(torch.ones(3))
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        fast(torch.ones(3))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    fast(torch.ones(3))
    assert len(capturer.graphs) == 2


def test_parameters_may_change_in_place() -> None:
    cache, capturer = recorded()
    linear = nn.Linear(4, 4)
    fast = GraphedFunction(linear, cache=cache)
    x = torch.randn(2, 4)
    with torch.no_grad():
        fast(x)
        linear.weight.mul_(2.0)
        linear.load_state_dict(nn.Linear(4, 4).state_dict())
        assert torch.equal(fast(x), linear(x))
    assert len(capturer.graphs) == 1


def _new_storage(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data.clone() + 1.0


def _assigned(model: nn.Sequential) -> None:
    model.load_state_dict({k: v + 1.0 for k, v in model.state_dict().items()}, assign=True)


def _new_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight + 1.0)


def _new_submodule(model: nn.Sequential) -> None:
    model[0] = nn.Linear(4, 4)


def _added_submodule(model: nn.Sequential) -> None:
    model.append(nn.Tanh())


def _eval(model: nn.Sequential) -> None:
    model.eval()


@pytest.mark.parametrize(
    "change", [_new_storage, _assigned, _new_parameter, _new_submodule, _added_submodule, _eval]
)
def test_changes_that_a_graph_would_miss_are_captured_again(change: object) -> None:
    cache, capturer = recorded()
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))
    fast = GraphedFunction(lambda x: model(x), modules=[model], cache=cache)
    x = torch.randn(2, 4)
    with torch.no_grad():
        fast(x)
        change(model)  # type: ignore[operator]
        assert torch.equal(fast(x), model(x))
        fast(x)
    assert len(capturer.graphs) == 2


# Buffers.


def test_results_are_copies_unless_clone_is_false() -> None:
    cache, _ = recorded()
    kept, viewed = GraphedFunction(double, cache=cache), GraphedFunction(double, cache=cache, clone=False)
    for fast, expected in ((kept, 2.0), (viewed, 6.0)):
        first = fast(torch.ones(3))
        fast(torch.full((3,), 3.0))
        assert first.tolist() == [expected] * 3


def test_poisoned_buffers_leave_no_trace() -> None:
    """Every call overwrites all inputs, and every replay overwrites all outputs."""
    cache, capturer = recorded()
    fast = GraphedFunction(lambda x, y: (x + y, None, x * y), cache=cache)
    x, y = torch.randn(2, 3, 4).unbind()
    fast(x, y)
    for tensor in cache._entries[next(iter(cache._entries))].payload.tensors:
        tensor.fill_(torch.nan)
    for output in capturer.graphs[0].outputs:
        if output is not None:
            output.fill_(torch.nan)
    total, nothing, product = fast(y, y)
    assert nothing is None
    assert torch.equal(total, y + y) and torch.equal(product, y * y)


def test_strided_and_expanded_arguments() -> None:
    cache, _ = recorded()
    fast = GraphedFunction(double, cache=cache)
    x = torch.randn(4, 6)
    for view in (x.t(), x.expand(2, 4, 6), x[::2, ::3]):
        assert torch.equal(fast(view), 2 * view)


# Buckets.


@pytest.mark.parametrize("bucket", [power_of_two, eighths, multiple_of(24)])
def test_buckets_are_large_enough_and_idempotent(bucket: graphs.Bucket) -> None:
    sizes = [bucket(size) for size in range(1, 3000)]
    assert all(rounded >= size for size, rounded in zip(range(1, 3000), sizes, strict=True))
    assert sizes == sorted(sizes)
    assert all(bucket(rounded) == rounded for rounded in set(sizes))


def test_how_much_buckets_pad() -> None:
    assert [power_of_two(size) for size in (1, 2, 3, 97)] == [1, 2, 4, 128]
    assert [eighths(size) for size in (1, 16, 17, 97, 768)] == [1, 16, 18, 104, 768]
    assert max(eighths(size) / size for size in range(1, 5000)) <= 1.125
    with pytest.raises(ValueError, match="at least 1"):
        multiple_of(0)


def test_shapes_of_one_bucket_share_a_graph_and_results_are_cropped() -> None:
    cache, capturer = recorded()
    seen: list[tuple[int, ...]] = []

    def function(x: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(x.shape))
        return x * flags.unsqueeze(-1), x.sum(dim=2)

    fast = GraphedFunction(
        function,
        axes=("BL", "BL"),
        out_axes=("BL", "BL"),
        buckets={"B": power_of_two, "L": multiple_of(4)},
        cache=cache,
    )
    for batch, length in ((4, 8), (3, 7), (3, 8), (4, 5), (3, 6), (4, 8)):
        x, flags = torch.randn(batch, length, 2), torch.ones(batch, length)
        product, total = fast(x, flags)
        assert torch.equal(product, x) and torch.equal(total, x.sum(dim=2))
    assert len(capturer.graphs) == 1
    assert set(seen) == {(4, 8, 2)}
    fast(torch.randn(4, 9, 2), torch.ones(4, 9))
    assert len(capturer.graphs) == 2


def test_padding_is_zero_after_larger_arguments() -> None:
    cache, _ = recorded()
    fast = GraphedFunction(
        lambda x: x.sum(dim=(0, 1)), axes=("BL",), buckets={"B": power_of_two, "L": power_of_two}, cache=cache
    )
    for batch, length in ((4, 4), (3, 4), (4, 3), (3, 3), (4, 4), (3, 3)):
        x = torch.ones(batch, length, 1)
        assert fast(x).item() == batch * length


def test_axes_that_disagree_are_refused() -> None:
    cache, _ = recorded()
    fast = GraphedFunction(torch.add, axes=("B", "B"), buckets={"B": power_of_two}, cache=cache)
    with pytest.raises(ValueError, match="axis B has sizes 3 and 4"):
        fast(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="no argument has the axes L"):
        GraphedFunction(torch.add, axes=("B", "B"), buckets={"L": power_of_two})


# Bounds.


def test_least_recently_used_graphs_are_evicted() -> None:
    cache, capturer = recorded(max_graphs=2)
    fast = GraphedFunction(double, cache=cache)
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    fast(one), fast(two), fast(one), fast(three)  # type: ignore[func-returns-value]
    assert [graph.released for graph in capturer.graphs] == [False, True, False]
    fast(one)
    assert len(capturer.graphs) == 3
    fast(two)
    assert len(capturer.graphs) == 4 and len(cache) == 2
    assert cache.status().evictions == 2


def test_graphs_share_a_pool_up_to_a_quarter_of_the_limit() -> None:
    cache, capturer = recorded(10, max_bytes=100)
    fast = GraphedFunction(double, cache=cache)
    for size in range(1, 7):
        fast(torch.ones(size))
    numbers = [capturer.pools.index(pool) for pool in capturer.used_pools]
    assert numbers == [0, 0, 0, 1, 1, 1]
    assert cache.nbytes == 60


def test_least_recently_used_pools_are_evicted() -> None:
    cache, capturer = recorded(30, max_bytes=100)
    fast = GraphedFunction(double, cache=cache)
    for size in (1, 2, 3):
        fast(torch.ones(size))
    fast(torch.ones(1))
    fast(torch.ones(4))
    assert [graph.released for graph in capturer.graphs] == [False, True, False, False]
    assert cache.nbytes == 90 and capturer.trims == 1


def test_a_pool_that_is_too_large_on_its_own_is_replaced() -> None:
    cache, capturer = recorded(20, 90, 50, max_bytes=100)
    fast = GraphedFunction(double, cache=cache)
    fast(torch.ones(1))
    fast(torch.ones(2))  # 20 + 90 in one pool; on its own this graph takes 50
    assert [graph.released for graph in capturer.graphs] == [True, True, False]
    assert cache.nbytes == 50 and len(cache) == 1


def test_a_graph_larger_than_the_limit_is_rejected_and_reported() -> None:
    cache, capturer = recorded(200, max_bytes=100)
    fast = GraphedFunction(double, cache=cache)
    with pytest.warns(graphs.GraphFallbackWarning, match="more than the cache's 100 bytes"):
        assert fast(torch.ones(3)).tolist() == [2.0] * 3
    fast(torch.ones(3))
    assert len(capturer.graphs) == 1 and capturer.graphs[0].released and cache.nbytes == 0
    assert list(cache.status().fallbacks.values()) == [2]


def test_a_graph_rejected_for_its_size_evicts_no_other() -> None:
    cache, capturer = recorded(30, 200, max_bytes=100)
    fast = GraphedFunction(double, cache=cache)
    fast(torch.ones(1))
    with pytest.warns(graphs.GraphFallbackWarning):
        fast(torch.ones(2))
    assert [graph.released for graph in capturer.graphs] == [False, True]
    assert len(cache) == 1 and cache.nbytes == 30


def test_clearing_frees_all_memory_and_failed_keys() -> None:
    cache, capturer = recorded(10)
    fast = GraphedFunction(double, cache=cache)
    capturer.failure = RuntimeError("no")
    with pytest.warns(graphs.GraphFallbackWarning):
        fast(torch.ones(1))
    capturer.failure = None
    fast(torch.ones(2))
    cache.clear()
    assert len(cache) == 0 and cache.nbytes == 0 and capturer.graphs[0].released
    fast(torch.ones(1))
    assert len(capturer.graphs) == 2


@pytest.mark.parametrize("bounds", [{"max_graphs": 0}, {"max_bytes": -1}])
def test_invalid_limits_are_rejected(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        GraphCache(**bounds)  # type: ignore[arg-type]


def test_graphs_of_a_deleted_function_are_unreachable() -> None:
    """A new function must not get the graphs of an old one that had the same id."""
    cache, capturer = recorded()
    for factor in range(6):
        fast = GraphedFunction(lambda x, factor=factor: factor * x, cache=cache)
        assert fast(torch.ones(1)).item() == factor
        del fast
        gc.collect()
    assert len(capturer.graphs) == 6


# Fallbacks.


def fallback_of(fast: GraphedFunction, *arguments: Tensor, **static: object) -> str:
    """Return the only reason for which a call falls back; its second call must not warn."""
    expected = fast.function(*arguments, **static)
    with pytest.warns(graphs.GraphFallbackWarning) as found:
        assert torch.equal(fast(*arguments, **static), expected)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(*arguments, **static)  # type: ignore[arg-type]
    (reason, count), *others = fast.cache.status().fallbacks.items()
    assert count == 2 and not others
    assert len(found) == 1 and reason in str(found[0].message)
    assert graph_status().fallbacks[reason] >= 2
    return reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_calls_fall_back() -> None:
    assert "on the cpu" in fallback_of(GraphedFunction(double), torch.ones(3))


def test_the_environment_can_turn_graphs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_internals, "_SETTING", "0")
    assert fallback_of(GraphedFunction(double), torch.ones(3)) == "TRM_GRAPHS=0"
    assert graphs.unavailable() == "TRM_GRAPHS=0"
    monkeypatch.setattr(capture_internals, "_SETTING", "maybe")
    with pytest.raises(ValueError, match=r"^TRM_GRAPHS: 'maybe' is neither 0 nor 1"):
        graphs.unavailable()
    with pytest.raises(ValueError, match="TRM_GRAPHS"):
        GraphedFunction(double)(torch.ones(3))


def test_recording_gradients_prevents_replays() -> None:
    for function, x in ((nn.Linear(3, 3), torch.ones(1, 3)), (double, torch.ones(1, requires_grad=True))):
        cache_internals._WARNED.clear()
        fast = GraphedFunction(function, cache=recorded()[0])
        assert "gradients" in fallback_of(fast, x)


def test_hooks_prevent_replays() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    fast = GraphedFunction(model, cache=recorded()[0])
    fast(torch.ones(1, 3))
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    assert "a Linear has hooks" in fallback_of(fast, torch.ones(1, 3))
    assert calls


def test_wrapped_parameters_are_not_watched() -> None:
    class Wrapped(Tensor):
        pass

    model = nn.Linear(3, 3).requires_grad_(False)
    model.weight = nn.Parameter(model.weight.data.as_subclass(Wrapped), requires_grad=False)
    del model._parameters["weight"]
    model.register_buffer("weight", torch.ones(3, 3).as_subclass(Wrapped))
    fast = GraphedFunction(model, cache=recorded()[0])
    with pytest.warns(graphs.GraphFallbackWarning, match="a module holds a Wrapped"):
        fast(torch.ones(1, 3))


@pytest.mark.parametrize(
    ("arguments", "static", "reason"),
    [
        ((torch.ones(0, 3),), {}, "empty"),
        ((torch.ones(3),), {"factor": [2]}, "factor is not hashable"),
        ((torch.ones(3), torch.ones(3, device="meta")), {}, "on cpu and meta"),
    ],
)
def test_calls_that_make_no_graph(arguments: tuple[Tensor, ...], static: dict, reason: str) -> None:
    fast = GraphedFunction(lambda x, y=None, factor=None: 2 * x, cache=recorded()[0])
    assert reason in fallback_of(fast, *arguments, **static)


def test_a_result_that_is_not_a_tensor_falls_back() -> None:
    fast = GraphedFunction(lambda x: {"x": x}, cache=recorded()[0])
    with pytest.warns(graphs.GraphFallbackWarning, match="something other than tensors"):
        assert set(fast(torch.ones(1))) == {"x"}


def test_a_failed_capture_is_not_retried_and_does_no_harm() -> None:
    cache, capturer = recorded()
    fast = GraphedFunction(double, cache=cache)
    fast(torch.ones(1))
    capturer.failure = RuntimeError("operation not permitted")
    with pytest.warns(graphs.GraphFallbackWarning, match="operation not permitted"):
        assert fast(torch.ones(2)).tolist() == [2.0, 2.0]
    capturer.failure = None
    warmups = capturer.warmups
    assert fast(torch.ones(2)).tolist() == [2.0, 2.0]
    assert capturer.warmups == warmups
    assert fast(torch.ones(1)).tolist() == [2.0]
    fast(torch.ones(3))
    assert len(capturer.graphs) == 2
    assert capturer.used_pools[0] is not capturer.used_pools[1], (
        "the pool of a failed capture is not used again"
    )


def test_exceptions_of_the_function_propagate() -> None:
    cache, capturer = recorded()

    def function(x: Tensor) -> Tensor:
        if x.shape == (2,):
            raise ArithmeticError("not two")
        return 2 * x

    fast = GraphedFunction(function, cache=cache)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            fast(torch.ones(2))
    assert not cache.status().fallbacks
    assert fast(torch.ones(1)).item() == 2.0
    assert len(capturer.graphs) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_llm_trm_env_reports_why_there_are_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(CliRunner().invoke(main, ["env", "--json"]).stdout)
    assert facts["graphs"] == {"unavailable": "no CUDA device"}
    assert "unavailable, calls run without them: no CUDA device" in CliRunner().invoke(main, ["env"]).stdout
    monkeypatch.setattr(capture_internals, "_SETTING", "0")
    assert "calls run without them: TRM_GRAPHS=0" in CliRunner().invoke(main, ["env"]).stdout


# Nesting and threads.


def test_inside_another_capture_a_function_runs_eagerly() -> None:
    inner_cache, inner_capturer = recorded()
    outer_cache, outer_capturer = recorded()
    inner = GraphedFunction(double, cache=inner_cache)
    outer = GraphedFunction(lambda x: inner(x) + 1, cache=outer_cache)
    assert outer(torch.ones(1)).item() == 3.0
    assert not inner_capturer.graphs and len(outer_capturer.graphs) == 1
    inner_capturer.is_capturing = True
    assert inner(torch.ones(1)).item() == 2.0
    assert not inner_capturer.graphs and not inner_cache.status().fallbacks


def test_threads_share_a_function() -> None:
    cache, capturer = recorded(max_graphs=2)
    fast = GraphedFunction(lambda x: (x + 1).cumsum(0), cache=cache)
    failures: list[object] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for number in range(60):
            x = torch.randn(1 + (seed + number) % 3, generator=generator)
            if not torch.equal(fast(x), (x + 1).cumsum(0)):
                failures.append((seed, number))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(cache) <= 2 and sum(not graph.released for graph in capturer.graphs) == len(cache)
    assert cache.status().replays == 240


# Recursions.

FAMILIES = {"seed": {}, "scratch": {"family": "scratch"}, "paper": {"family": "paper"}}


def graphed_recursion(
    net: nn.Module, n: int = 2, T: int = 2, **options: object
) -> tuple[GraphedRecursion, RecordingCapturer]:
    cache, capturer = recorded()
    return graphed(net, n, T, cache=cache, **options), capturer


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_a_recursion_without_padding_is_the_plain_one(options: dict[str, object]) -> None:
    net = network(**options)
    norm = nn.RMSNorm(16)
    fast, capturer = graphed_recursion(net, output_norm=norm)
    mask = torch.tensor([[1] * 8, [1, 1, 0, 0, 0, 0, 0, 1]])
    for given in (None, mask, None, mask):
        x, y, z = states()
        found = fast(x, y, z, mask=given)
        with torch.no_grad():
            expected = deep_recursion(net, x, y, z, 2, 2, mask=given, output_norm=norm)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs) and not ours.requires_grad
    assert len(capturer.graphs) == 2


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_padded_recursion_agrees_with_the_plain_one(options: dict[str, object], masked: bool) -> None:
    net = network(**options)
    fast, capturer = graphed_recursion(net, batch=power_of_two, length=multiple_of(8))
    for batch, length in ((4, 8), (3, 5), (3, 8), (4, 7), (3, 7)):
        x, y, z = states(batch, length)
        mask = (torch.rand(batch, length) < 0.7).index_fill_(1, torch.tensor(0), True) if masked else None
        found = fast(x, y, z, mask=mask)
        expected = deep_recursion(net, x, y, z, 2, 2, mask=mask, with_gradients=False)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        padded = [nn.functional.pad(s, (0, 0, 0, 8 - length, 0, 4 - batch)) for s in (x, y, z)]
        valid = torch.ones(batch, length, dtype=torch.uint8) if mask is None else mask
        same = deep_recursion(
            net,
            *padded,
            2,
            2,
            mask=nn.functional.pad(valid, (0, 8 - length, 0, 4 - batch)),
            with_gradients=False,
        )
        if masked or length < 8:
            for ours, theirs in zip(found, same, strict=True):
                assert torch.equal(ours, theirs[:batch, :length]), "the plain path on the same bucket"
    assert len(capturer.graphs) == (1 if masked else 2)


def test_a_network_without_mask_is_not_padded_in_length() -> None:
    net = network(family="paper", mixer="tokens", seq_len=97)
    fast, _ = graphed_recursion(net)
    assert fast(*states(1, 97))[0].shape == (1, 97, 16)
    assert next(iter(fast.graphed.cache._entries.values())).payload.tensors[0].shape == (1, 97, 16)
    with pytest.raises(ValueError, match="accepts no mask"):
        graphed(net, 2, 2, length=eighths)
    with pytest.raises(ValueError, match="accepts no mask"):
        graphed(torch.tanh, 2, 2, length=eighths)
    with pytest.raises(ValueError, match="'auto'"):
        graphed(net, 2, 2, length="sometimes")


def test_options_reach_the_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def recursion(
        net: object, x: Tensor, y: Tensor, z: Tensor, *_: int, **options: object
    ) -> tuple[Tensor, Tensor]:
        seen.update(options)
        return y, z

    monkeypatch.setattr("trm_kernels.graphs.recursion.deep_recursion", recursion)
    fast, _ = graphed_recursion(network(), memory="small")
    fast(*states())
    assert seen["memory"] == "small" and seen["with_gradients"] is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_on_a_cpu_a_graphed_recursion_is_the_plain_recursion() -> None:
    net = network()
    fast = graphed(net, 2, 2)
    x, y, z = states(3, 21)
    with pytest.warns(graphs.GraphFallbackWarning):
        found = fast(x, y, z)
    expected = deep_recursion(net, x, y, z, 2, 2, with_gradients=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_casts_are_not_cached_across_replays() -> None:
    cache, _ = recorded()
    linear = nn.Linear(4, 4)
    fast = GraphedFunction(lambda x: linear(x), modules=[linear], cache=cache)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fast(x)
        linear.weight.zero_()
        linear.bias.zero_()
        assert not fast(x).any()


# On a GPU: the capture itself.


@pytest.fixture
def gpu_cache() -> Iterator[GraphCache]:
    cache = GraphCache(max_bytes=8 << 30)
    yield cache
    cache.clear()


def gpu_network(dropout: float = 0.0, width: int = 64) -> TinyRecursiveNetwork:
    return TinyRecursiveNetwork(width, 2, 4, dropout).cuda()


def gpu_states(batch: int, length: int, width: int = 64) -> list[Tensor]:
    return [torch.randn(batch, length, width, device="cuda") for _ in range(3)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_replay_equals_the_eager_path_bit_for_bit(
    gpu_cache: GraphCache, backend: str, dtype: torch.dtype
) -> None:
    net = gpu_network().to(dtype).eval()
    net.backend = backend
    norm = nn.RMSNorm(64, device="cuda", dtype=dtype)
    fast = graphed(net, 3, 2, output_norm=norm, cache=gpu_cache)
    for _ in range(4):
        x, y, z = (state.to(dtype) for state in gpu_states(8, 64))
        mask = torch.rand(8, 64, device="cuda") < 0.8
        for given in (None, mask):
            found = fast(x, y, z, mask=given)
            expected = deep_recursion(net, x, y, z, 3, 2, mask=given, output_norm=norm, with_gradients=False)
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs)
    status = gpu_cache.status()
    assert not status.fallbacks and status.graphs == 2 and status.replays == 8


@pytest.mark.gpu
def test_gpu_padded_equals_the_eager_path_on_the_bucket(gpu_cache: GraphCache) -> None:
    net = gpu_network().eval()
    fast = graphed(net, 2, 2, batch=power_of_two, length=multiple_of(32), cache=gpu_cache)
    for batch, length in ((4, 64), (3, 50), (4, 40), (3, 64)):
        x, y, z = gpu_states(batch, length)
        valid = torch.ones(batch, length, dtype=torch.uint8, device="cuda")
        sizes = (0, 64 - length, 0, 4 - batch)
        padded = [nn.functional.pad(s, (0, 0, *sizes)) for s in (x, y, z)]
        expected = deep_recursion(
            net, *padded, 2, 2, mask=nn.functional.pad(valid, sizes), with_gradients=False
        )
        for ours, theirs in zip(fast(x, y, z, mask=valid), expected, strict=True):
            assert torch.equal(ours, theirs[:batch, :length])
    assert gpu_cache.status().graphs == 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gpu_dropout_is_fresh_and_follows_the_generator(gpu_cache: GraphCache, backend: str) -> None:
    net = gpu_network(dropout=0.3).train()
    net.backend = backend
    fast = graphed(net, 2, 2, cache=gpu_cache)
    x, y, z = gpu_states(4, 64)
    fast(x, y, z)
    first, second = fast(x, y, z)[0], fast(x, y, z)[0]
    assert not torch.equal(first, second), "two replays drew the same numbers"
    torch.cuda.manual_seed(7)
    replayed = [fast(x, y, z)[0] for _ in range(2)]
    torch.cuda.manual_seed(7)
    plain = [deep_recursion(net, x, y, z, 2, 2, with_gradients=False)[0] for _ in range(2)]
    for ours, theirs in zip(replayed, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_gpu_the_first_call_draws_the_numbers_of_an_eager_call(gpu_cache: GraphCache) -> None:
    """Warm-up and capture restore the state of the generator."""
    fast = GraphedFunction(lambda x: x + torch.rand_like(x), cache=gpu_cache)
    x = torch.zeros(1000, device="cuda")
    torch.cuda.manual_seed(3)
    found = [fast(x), fast(x), torch.rand(5, device="cuda")]
    torch.cuda.manual_seed(3)
    expected = [torch.rand_like(x), torch.rand_like(x), torch.rand(5, device="cuda")]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_gpu_two_runs_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        cache = GraphCache()
        net = gpu_network(dropout=0.1)
        fast = graphed(net, 2, 2, cache=cache)
        x, y, z = gpu_states(4, 64)
        for _ in range(3):
            y, z = fast(x, y, z)
        results.append((y, z))
        cache.clear()
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gpu_a_parameter_update_between_replays_is_seen(gpu_cache: GraphCache, backend: str) -> None:
    net = gpu_network().eval()
    net.backend = backend
    fast = graphed(net, 2, 2, cache=gpu_cache)
    x, y, z = gpu_states(2, 64)
    before = fast(x, y, z)[0]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for change in ("optimizer", "data", "load_state_dict", "in place"):
        if change == "optimizer":
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        elif change == "data":
            for parameter in net.parameters():
                parameter.data.mul_(1.01)
        elif change == "load_state_dict":
            net.load_state_dict(gpu_network().state_dict())
        else:
            with torch.no_grad():
                net.layers[0].norm1.weight.add_(0.5)
        found = fast(x, y, z)[0]
        assert not torch.equal(found, before), change
        expected = deep_recursion(net, x, y, z, 2, 2, with_gradients=False)[0]
        assert torch.equal(found, expected), change
        before = found
    assert gpu_cache.status().captures == 1


@pytest.mark.gpu
def test_gpu_moved_parameters_are_captured_again(gpu_cache: GraphCache) -> None:
    net = gpu_network().eval()
    fast = graphed(net, 2, 2, cache=gpu_cache)
    x, y, z = gpu_states(2, 64)
    fast(x, y, z)
    state = {name: value + 0.01 for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    assert torch.equal(fast(x, y, z)[0], deep_recursion(net, x, y, z, 2, 2, with_gradients=False)[0])
    assert gpu_cache.status().captures == 2


@pytest.mark.gpu
def test_gpu_eviction_frees_memory() -> None:
    def function(x: Tensor) -> Tensor:
        return (x.repeat(64, 1) + 1).view(64, -1).sum(dim=0)  # temporaries of 64 MiB and more

    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved()
    cache = GraphCache(max_graphs=8, max_bytes=512 << 20)
    fast = GraphedFunction(function, cache=cache)
    for size in range(1, 13):
        x = torch.ones(1, size << 18, device="cuda")
        assert torch.equal(fast(x), torch.full((size << 18,), 128.0, device="cuda"))
        assert cache.nbytes <= 512 << 20
    assert cache.status().evictions > 0 and cache.nbytes > 0
    del x
    cache.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - start <= 8 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("culprit", ["item", "raise"])
def test_gpu_a_failed_capture_does_no_harm(gpu_cache: GraphCache, culprit: str) -> None:
    def function(x: Tensor) -> Tensor:
        if x.shape == (2,):
            if culprit == "item":
                return x * x.sum().item()
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("not while capturing")
        return 2 * x

    fast = GraphedFunction(function, cache=gpu_cache)
    fast(torch.ones(1, device="cuda"))
    stream = torch.cuda.current_stream()
    with pytest.warns(graphs.GraphFallbackWarning, match="capturing failed"):
        assert fast(torch.ones(2, device="cuda")).tolist() == [2.0, 2.0]
    assert torch.cuda.current_stream() == stream
    torch.rand(3, device="cuda")  # after a failed capture, torch 2.11 itself could not draw any more
    for size in (1, 3, 2, 4, 1):
        assert fast(torch.ones(size, device="cuda")).tolist() == [2.0] * size
    assert gpu_cache.status().graphs == 3
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_the_steady_state_never_waits(gpu_cache: GraphCache) -> None:
    net = gpu_network().eval()
    fast = graphed(net, 2, 2, cache=gpu_cache)
    x, y, z = gpu_states(3, 50)
    mask = torch.ones(3, 50, device="cuda")
    fast(x, y, z, mask=mask), fast(x, y, z)  # type: ignore[func-returns-value]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            y, z = fast(x, y, z, mask=mask)
            y, z = fast(x, y, z)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gpu_cache.status().captures == 2


@pytest.mark.gpu
def test_gpu_streams_are_ordered(gpu_cache: GraphCache) -> None:
    """Graphs that share a pool must not overlap, whatever streams their callers use."""
    fast = GraphedFunction(lambda x: (x @ x).relu() @ x, cache=gpu_cache)
    inputs = [torch.randn(size, size, device="cuda") / size for size in (512, 640, 768)]
    expected = [(x @ x).relu() @ x for x in inputs]
    for x in inputs:
        fast(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for number in range(60):
        with torch.cuda.stream(streams[number % 3]):
            results.append((number % 3, fast(inputs[number % 3])))
    torch.cuda.synchronize()
    for which, result in results:
        assert torch.equal(result, expected[which])


@pytest.mark.gpu
def test_gpu_graphs_are_available() -> None:
    assert graphs.unavailable() is None
