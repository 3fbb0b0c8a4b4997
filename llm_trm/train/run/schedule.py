"""Learning rate over a run."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at update ``step``, counted from 0.

    Rises linearly to 1 over the first ``warmup`` updates, whose first has 1 / warmup, and falls from there
    as a half cosine, which would reach 0 at ``total``.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
