"""Evaluates how well a recursion predicts the state after thinking, compared with baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.evaluate.baselines import Baseline, Ridge, fit_baselines, require_enough, summarise
from llm_trm.evaluate.statistics import group_labels, value_of, wilson
from llm_trm.models.contexts import Contexts, errors
from llm_trm.models.loading import load_thinking_model

if TYPE_CHECKING:
    from llm_trm.choices import Halting
    from llm_trm.data.pairs import PairFiles
    from llm_trm.models.compression import DimensionCompressor
    from llm_trm.models.sequence_trm import SequenceTRM

#: Names of the rows that are not baselines. The second is the upper bound that the compressor permits.
TRM, TRUE_STATE = "TRM", "true state"
#: ``head(states)``: logits [B, V] of normalised states [B, D].
Head = Callable[[Tensor], Tensor]

#: Number of rows to compress at a time.
_ROWS = 65536


@dataclass(frozen=True)
class Scores:
    """Metrics averaged over pairs; None if not available.

    Attributes:
        pairs: Number of pairs.
        cosine: Cosine similarity of the prediction and the true state, both compressed.
        mse: Mean squared error over the elements of a compressed state.
        relative_error: ``|predicted - true| / |true|`` of the compressed states.
        full_cosine: Cosine similarity of the decompressed prediction and the language model's state.
        rank1: Fraction of pairs whose next token has the highest logit for the decompressed prediction.
        rank1_interval: Its 95% Wilson interval.
        top5: Fraction of pairs whose next token is among the five highest.
        reciprocal_rank: Mean of 1 / rank of the next token.
        steps: Number of supervision steps.
    """

    pairs: int
    cosine: float
    mse: float
    relative_error: float
    full_cosine: float
    rank1: float | None = None
    rank1_interval: tuple[float, float] | None = None
    top5: float | None = None
    reciprocal_rank: float | None = None
    steps: float | None = None


@dataclass(frozen=True)
class Phase2Evaluation:
    """Result of :func:`evaluate_phase2`.

    Attributes:
        rows: Scores of :data:`TRM`, the baselines and :data:`TRUE_STATE`, over all pairs.
        by: The field that pairs were grouped by, or None.
        groups: The same rows for each group.
        ridge_strength: Regularisation strength chosen for the ridge regression; None without it.
    """

    rows: dict[str, Scores]
    by: str | None = None
    groups: dict[str, dict[str, Scores]] = field(default_factory=dict)
    ridge_strength: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values; non-finite metrics become None."""
        return {
            "rows": {name: _plain(scores) for name, scores in self.rows.items()},
            "by": self.by,
            "groups": {
                group: {name: _plain(scores) for name, scores in rows.items()}
                for group, rows in self.groups.items()
            },
            "ridge_strength": self.ridge_strength,
        }


def evaluate_phase2(
    trm: SequenceTRM,
    compressor: DimensionCompressor,
    pairs: PairFiles,
    *,
    head: Head | None = None,
    train_pairs: PairFiles | None = None,
    max_steps: int = 8,
    halting: Halting = "sample",
    batch_size: int = 64,
    by: str | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Phase2Evaluation:
    """Compare the predictions of ``trm`` and of baselines on ``pairs`` with the true states.

    Args:
        trm: The model in eval mode. The computation runs on its device.
        compressor: A compressor on the same device.
        pairs: Held-out pairs; read shard by shard.
        head: The language model's head on the same device; None for no token metrics.
        train_pairs: Pairs to fit the baselines on; None for no baselines.
        max_steps, halting: As for :meth:`SequenceTRM.reason`.
        batch_size: Contexts per batch. With ``halting="batch"`` it determines which samples halt together.
        by: Field of the records to group pairs by, or ``"operations"``, which is counted in the problems
            of the arithmetic world. More than ten different numbers are grouped by quartiles.
        progress: Called with the number of pairs just processed, including training pairs.

    Raises:
        InputError: There are no pairs or too few training pairs, a shard is invalid, or a field or token does
            not exist.
    """
    require_evaluable(pairs, by, train_pairs)
    device = trm.reasoning_token.device
    baselines: dict[str, Baseline] = {}
    if train_pairs is not None:
        baselines = fit_baselines(_summaries(train_pairs, compressor, device, progress))
    measured: dict[str, list[dict[str, Tensor]]] = {}
    values: list[Any] = []
    for batch in _batches(pairs, compressor, device, batch_size):
        reasoning = trm.reason(batch.context, batch.mask, max_steps=max_steps, halting=halting)
        predictions = {TRM: reasoning.state}
        predictions |= {name: predict(batch.last, batch.mean) for name, predict in baselines.items()}
        predictions[TRUE_STATE] = batch.target
        ids = None
        if head is not None:
            ids = torch.tensor([record["next_token"] for record in batch.records], device=device)
        for name, predicted in predictions.items():
            metrics = measure(predicted.to(device), batch.target, batch.hidden_post, compressor, head, ids)
            if name == TRM:
                metrics["steps"] = reasoning.steps
            measured.setdefault(name, []).append({key: value.cpu() for key, value in metrics.items()})
        values += [None if by is None else value_of(record, by) for record in batch.records]
        progress(len(batch.records))
    metrics_of = {
        name: {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for name, parts in measured.items()
    }
    ridge = next((baseline for baseline in baselines.values() if isinstance(baseline, Ridge)), None)
    return Phase2Evaluation(
        {name: score(metrics) for name, metrics in metrics_of.items()},
        by,
        _grouped(metrics_of, values) if by is not None else {},
        None if ridge is None else ridge.strength,
    )


def require_evaluable(pairs: PairFiles, by: str | None = None, train_pairs: PairFiles | None = None) -> None:
    """Raise InputError if :func:`evaluate_phase2` would reject its arguments. Does not read states.

    Args:
        pairs, by, train_pairs: Arguments of :func:`evaluate_phase2`.
    """
    if pairs.samples == 0:
        raise InputError(f"{pairs.folder} has no pairs: generate some with llm-trm datagen")
    if by is not None and all(value_of(record, by) is None for record in pairs.records()):
        raise InputError(f"--by {by}: no record of {pairs.folder} has such a field")
    if train_pairs is not None:
        require_enough(train_pairs.samples)


@torch.no_grad()
def measure(
    predicted: Tensor,
    target: Tensor,
    hidden_post: Tensor,
    compressor: DimensionCompressor,
    head: Head | None = None,
    next_tokens: Tensor | None = None,
) -> dict[str, Tensor]:
    """Metrics of each pair, [B] by name; ``rank`` only with a head and tokens.

    Args:
        predicted, target: Compressed states [B, D'].
        hidden_post: The language model's states after thinking [B, D].
        head: The language model's head.
        next_tokens: Ids of the next tokens [B].

    Raises:
        InputError: A token is not in the head's vocabulary.
    """
    restored = compressor.decompress(predicted)
    metrics = errors(predicted, target)
    metrics["full_cosine"] = F.cosine_similarity(restored, hidden_post, dim=-1)
    if head is not None and next_tokens is not None:
        logits = head(restored)
        if int(next_tokens.max()) >= logits.shape[1]:
            raise InputError(
                f"the pairs contain token {int(next_tokens.max())}, but the model has {logits.shape[1]} "
                "tokens: name the model that generated the pairs with --model"
            )
        metrics["rank"] = rank(logits, next_tokens)
    return metrics


def rank(logits: Tensor, ids: Tensor) -> Tensor:
    """Rank of each token, int64 [B]: 1 plus the number of tokens with a strictly higher logit.

    NaN logits count as higher, so that invalid predictions rank last.

    Args:
        logits: [B, V].
        ids: [B].
    """
    own = logits.gather(1, ids[:, None])
    return 1 + (~(logits <= own)).sum(dim=1) - own.isnan().squeeze(1).long()


def score(metrics: Mapping[str, Tensor]) -> Scores:
    """Average the metrics of :func:`measure`, and ``steps`` if available."""

    def mean(values: Tensor) -> float:
        return float(values.double().mean())

    scores = Scores(
        pairs=len(metrics["cosine"]),
        cosine=mean(metrics["cosine"]),
        mse=mean(metrics["mse"]),
        relative_error=mean(metrics["relative_error"]),
        full_cosine=mean(metrics["full_cosine"]),
        steps=mean(metrics["steps"]) if "steps" in metrics else None,
    )
    if "rank" not in metrics:
        return scores
    ranks = metrics["rank"]
    first = int((ranks == 1).sum())
    return replace(
        scores,
        rank1=first / len(ranks),
        rank1_interval=wilson(first, len(ranks)),
        top5=mean(ranks <= 5),
        reciprocal_rank=mean(ranks.double().reciprocal()),
    )


def load_head(
    name: str, device: torch.device, hidden_size: int, *, trust_remote_code: bool = False
) -> torch.nn.Module:
    """Load the head of the language model ``name`` in float32, and discard the rest of the model.

    States in pair files are normalised, so the head alone computes logits from them. The model's own Python
    files run only with ``trust_remote_code``.

    Raises:
        InputError: The model does not exist, or its width is not ``hidden_size``.
    """
    model = load_thinking_model(name, device, trust_remote_code=trust_remote_code)
    if model.hidden_size != hidden_size:
        raise InputError(
            f"model {name} has states of width {model.hidden_size}, but those of the pairs have "
            f"{hidden_size}: name the model that generated them with --model"
        )
    head = model.model.get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        raise InputError(f"model {name} has no output head: use a causal language model")
    return head.float()


@dataclass(frozen=True)
class _Batch:
    """Pairs: padded compressed contexts [B, L, D'] and mask [B, L], targets, last and mean states [B, D'].

    All are on the device except the last and mean states, which baselines read on the CPU.
    """

    context: Tensor
    mask: Tensor
    target: Tensor
    last: Tensor
    mean: Tensor
    hidden_post: Tensor
    records: list[dict[str, Any]]


@torch.no_grad()
def _compress(states: Tensor, compressor: DimensionCompressor, device: torch.device) -> Tensor:
    """Compress stored states [R, D] on ``device`` to float32 [R, D'] on the CPU."""
    return torch.cat([compressor(part.to(device).float()).cpu() for part in states.split(_ROWS)])


def _summaries(
    pairs: PairFiles,
    compressor: DimensionCompressor,
    device: torch.device,
    progress: Callable[[int], object],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for shard in pairs.shards():
        if not shard.records:
            continue
        last, mean = summarise(_compress(shard.hidden_pre, compressor, device), shard.offsets)
        yield last, mean, _compress(shard.hidden_post, compressor, device)
        progress(len(shard.records))


def _batches(
    pairs: PairFiles, compressor: DimensionCompressor, device: torch.device, batch_size: int
) -> Iterator[_Batch]:
    for shard in pairs.shards():
        if not shard.records:
            continue
        rows = _compress(shard.hidden_pre, compressor, device)
        contexts = Contexts(rows, shard.offsets, _compress(shard.hidden_post, compressor, device))
        last, mean = summarise(rows, shard.offsets)
        # Batch contexts of similar length to reduce padding.
        for chosen in shard.offsets.diff().argsort(stable=True).split(batch_size):
            batch = contexts.batch(chosen.tolist())
            yield _Batch(
                batch.context.to(device),
                batch.mask.to(device),
                batch.target.to(device),
                last[chosen],
                mean[chosen],
                shard.hidden_post[chosen].to(device).float(),
                [shard.records[number] for number in chosen.tolist()],
            )


def _grouped(
    metrics_of: Mapping[str, Mapping[str, Tensor]], values: Sequence[Any]
) -> dict[str, dict[str, Scores]]:
    labels = group_labels(values)
    ordered = sorted(zip(values, labels, strict=True), key=lambda pair: _order(pair[0]))
    groups = {}
    for label in dict.fromkeys(label for _, label in ordered):
        members = torch.tensor([own == label for own in labels])
        groups[label] = {
            name: score({key: tensor[members] for key, tensor in metrics.items()})
            for name, metrics in metrics_of.items()
        }
    return groups


def _order(value: Any) -> tuple[int, float, str]:
    """Sort key: numbers by value, then text, then unknown values."""
    if isinstance(value, (int, float)):
        return 0, float(value), ""
    return (2, 0.0, "") if value is None else (1, 0.0, str(value))


def _plain(scores: Scores) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(scores).items()
    }
