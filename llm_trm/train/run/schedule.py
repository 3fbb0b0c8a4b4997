"""Learning-rate schedules."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Fraction of the peak learning rate at update ``step``, counted from 0.

    It rises linearly to 1 over the first ``warmup`` updates, starting with 1 / warmup, and then falls as a
    half cosine, which would reach 0 at ``total``.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
