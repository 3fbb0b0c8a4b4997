"""Sampling whose noise depends only on the seed, the problem and the position.

Tokens are sampled with the Gumbel-max trick: ``argmax(logits / T + g)``, with independent standard Gumbel
noise g, is a sample from ``softmax(logits / T)``. The noise comes from SplitMix64 (Steele, Lea, Flood, OOPSLA
2014) used as a counter-based generator, so a problem gets the same noise in any batch and after an
interruption. Only the rounding of the logits still differs between batch shapes and devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_trm.data.generation_config import Sampling


def draw(sampling: Sampling, logits: Tensor, problem: Tensor, position: Tensor, greedy: Tensor) -> Tensor:
    """Sample one token per row.

    Args:
        sampling: Temperature, top-p and the seed of the noise.
        logits: ``[B, V]``.
        problem, position: ``[B]``, int64; index of the problem, and number of tokens generated so far.
        greedy: ``[B]``, bool; rows to decode greedily at any temperature.

    Returns:
        Token ids ``[B]``, int64.
    """
    likeliest = logits.argmax(-1)
    if sampling.temperature == 0:
        return likeliest
    scores = logits.float() / sampling.temperature
    if sampling.top_p < 1:
        scores = _nucleus(scores, sampling.top_p)
    scores += gumbel_noise(sampling.seed, problem, position, logits.shape[-1])
    return torch.where(greedy, likeliest, scores.argmax(-1))


def gumbel_noise(seed: int, problem: Tensor, position: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise ``[B, size]``, float32, on the device of ``problem`` and ``position``.

    Element v of row b is a function of ``seed``, ``problem[b]``, ``position[b]`` and v.
    """
    key = _mix(_mix(_mix(torch.full_like(problem, _signed(seed))) + problem) + position)
    counter = torch.arange(1, size + 1, device=problem.device) * _WEYL
    # The upper half: 32 random bits each.
    bits = _shifted(_mix(key[:, None] + counter), 32)
    # In (0, 1), most finely spaced near 0, where the noise is largest. At 1 the noise would be -infinity.
    uniform = bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    ranked, order = scores.sort(-1, descending=True)
    probability = ranked.softmax(-1)
    ranked[probability.cumsum(-1) - probability >= top_p] = float("-inf")
    return torch.empty_like(scores).scatter_(-1, order, ranked)


def _signed(value: int) -> int:
    """``value`` modulo 2^64, as a signed int64."""
    return (value + 2**63) % 2**64 - 2**63


_WEYL = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function on int64, whose products wrap like those of uint64."""
    z = z + _WEYL
    z = (z ^ _shifted(z, 30)).mul_(_FIRST)
    z = (z ^ _shifted(z, 27)).mul_(_SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; the built-in shift of int64 is arithmetic."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
