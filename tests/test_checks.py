"""Numbers that the public API rejects: NaN, infinity, bools, fractions, and values out of range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_trm import ranges
from trm_kernels import (
    AdamATan2,
    ParameterAverage,
    SparseEmbedding,
    SparseSignSGD,
    TinyRecursiveNetwork,
    TrainingStep,
    capturable_adam_atan2,
    capturable_adamw,
    deep_recursion,
    graphed,
    halting_recursion,
)
from trm_kernels.config import NetworkConfig
from trm_kernels.graphs import GraphCache, multiple_of
from trm_kernels.metrics import MetricBuffer

NAN, INF = math.nan, math.inf


def _weights() -> list[torch.Tensor]:
    return [torch.zeros(2, requires_grad=True)]


def _rows() -> list[SparseEmbedding]:
    embedding = SparseEmbedding(3, 2)
    embedding.allocate(2)
    return [embedding]


def _recurred(**counts: Any) -> None:
    x = torch.zeros(1, 2, 16)
    deep_recursion(TinyRecursiveNetwork(16, 1, 2, backend="eager"), x, x, x, **{"n": 1, "T": 1, **counts})


def _step(**options: Any) -> None:
    net = TinyRecursiveNetwork(16, 1, 2)
    optimizer = capturable_adamw(net.parameters(), lr=1e-3)
    TrainingStep(net, lambda y, z, x: (y.sum(), {}), optimizer, **{"n": 1, "T": 1, **options})


CASES: list[tuple[Callable[[], object], str]] = [
    *[
        (lambda name=name, value=value: NetworkConfig(**{"d_model": 64, "n_heads": 1, name: value}), name)  # type: ignore[misc]
        for name in ("d_model", "n_layers", "n_heads")
        for value in (NAN, INF, True, 2.0, -1, 10**20, "8")
    ],
    *[
        (lambda name=name, value=value: NetworkConfig(64, family="scratch", **{name: value}), name)  # type: ignore[misc]
        for name in ("dropout", "rope_theta")
        for value in (NAN, INF, -INF, True, -1.0, "0.1")
    ],
    (lambda: NetworkConfig(64, family="paper", mixer="tokens", seq_len=True), "seq_len"),
    (lambda: NetworkConfig(64, family="paper", mixer="tokens", seq_len=10**12), "seq_len"),
    (lambda: NetworkConfig(64, family="paper", rope=1), "rope"),  # type: ignore[arg-type]
    (lambda: NetworkConfig(10**9), "d_model"),
    (lambda: NetworkConfig(64, 10**8), "n_layers"),
    *[
        (lambda name=name, value=value: AdamATan2(_weights(), **{name: value}), name)  # type: ignore[misc]
        for name in ("lr", "weight_decay", "a", "b")
        for value in (NAN, INF, -1.0, True)
    ],
    (lambda: AdamATan2(_weights(), betas=(NAN, 0.9)), "betas"),
    (lambda: SparseEmbedding(True, 2), "num_embeddings"),
    (lambda: SparseEmbedding(3, NAN), "width"),  # type: ignore[arg-type]
    (lambda: SparseSignSGD(_rows(), NAN), "lr"),
    (lambda: SparseSignSGD(_rows(), weight_decay=INF), "weight_decay"),
    (lambda: capturable_adamw(_weights(), NAN), "lr"),
    (lambda: capturable_adamw([{"params": _weights(), "lr": INF}], 1e-3), "lr"),
    (lambda: capturable_adam_atan2(_weights(), -1.0), "lr"),
    (lambda: ParameterAverage(_weights(), NAN), "decay"),
    (lambda: ParameterAverage(_weights(), True), "decay"),
    (lambda: ParameterAverage(_weights()).load_state_dict({"decay": NAN, "averages": _weights()}), "decay"),
    (lambda: _recurred(n=True), "n"),
    (lambda: _recurred(n=NAN), "n"),
    (lambda: _recurred(T=True), "T"),
    (lambda: _recurred(T=1.5), "T"),
    (lambda: halting_recursion(lambda **_: ({}, torch.ones(1)), {"x": torch.zeros(1)}, True), "max_steps"),
    (lambda: _step(n=True), "n"),
    (lambda: _step(clip_norm=NAN), "clip_norm"),
    (lambda: _step(clip_norm=0.0), "clip_norm"),
    (lambda: _step(max_steps=4, exploration=NAN), "exploration"),
    (lambda: _step(supervision_steps=2.5), "supervision_steps"),
    (lambda: _step(read_every=True), "read_every"),
    (lambda: graphed(TinyRecursiveNetwork(16, 1, 2), n=True, T=1), "n"),
    (lambda: GraphCache(max_bytes=INF), "max_bytes"),  # type: ignore[arg-type]
    (lambda: multiple_of(NAN), "a bucket's step"),  # type: ignore[arg-type]
    (lambda: MetricBuffer(NAN), "read_every"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "name"), CASES)
def test_invalid_numbers_are_rejected_by_name(call: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^({name}|a and b) must"):
        call()


def test_the_ends_are_those_of_the_options() -> None:
    NetworkConfig(ranges.WIDTH.most, ranges.LAYERS.most)
    with pytest.raises(ValueError, match=rf"at most {ranges.WIDTH.most}"):
        NetworkConfig(ranges.WIDTH.most + 1)
    with pytest.raises(ValueError, match=rf"at most {ranges.LAYERS.most}"):
        NetworkConfig(64, ranges.LAYERS.most + 1)


@pytest.mark.parametrize("lr", [0.0, 1, 1e-3])
def test_valid_numbers_are_accepted(lr: float) -> None:
    AdamATan2(_weights(), lr=lr)
    capturable_adamw(_weights(), lr=lr)


@pytest.mark.parametrize(
    "config",
    [
        NetworkConfig(16, 3, 2),
        NetworkConfig(16, 2, 2, family="scratch"),
        NetworkConfig(16, 2, 2, family="scratch", mixer="tokens", seq_len=7),
        NetworkConfig(32, 2, 2, family="paper"),
        NetworkConfig(32, 1, 2, family="paper", mixer="tokens", seq_len=9),
    ],
    ids=lambda config: f"{config.family}-{config.mixer}",
)
def test_the_number_of_parameters_is_known_without_building(config: NetworkConfig) -> None:
    net = TinyRecursiveNetwork.from_config(config)
    assert config.parameters == sum(parameter.numel() for parameter in net.parameters())
