"""Padded sizes, so that a few graphs cover many shapes."""

from __future__ import annotations

from collections.abc import Callable

from trm_kernels import arguments

#: Rounds a size up: called with a size of at least 1, returns one at least as large.
Bucket = Callable[[int], int]


def power_of_two(size: int) -> int:
    """Return the smallest power of two not below ``size``: fewest buckets, up to twice the work."""
    return 1 << max(size - 1, 0).bit_length()


def eighths(size: int) -> int:
    """Round up to one of eight buckets between powers of two.

    At most an eighth of the work is padding. Sizes up to 16 are unchanged, 97 becomes 104, 768 is unchanged.
    """
    step = max(1, (1 << max(size - 1, 0).bit_length()) // 16)
    return -(-size // step) * step


def multiple_of(step: int) -> Bucket:
    """Return a bucket that rounds up to a multiple of ``step``."""
    arguments.integer("a bucket's step", step, 1)

    def bucket(size: int) -> int:
        return -(-size // step) * step

    return bucket
