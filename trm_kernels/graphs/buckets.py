"""Sizes to pad to, so that few graphs serve many shapes."""

from __future__ import annotations

from collections.abc import Callable

from trm_kernels import arguments

#: Rounds a size up: called with a size of at least 1, gives one at least as large.
Bucket = Callable[[int], int]


def power_of_two(size: int) -> int:
    """The smallest power of two that holds ``size``: fewest buckets, up to twice the work."""
    return 1 << max(size - 1, 0).bit_length()


def eighths(size: int) -> int:
    """Eight buckets between one power of two and the next: at most an eighth of the work is padding.

    Sizes up to 16 stay as they are, 97 becomes 104, 768 stays.
    """
    step = max(1, (1 << max(size - 1, 0).bit_length()) // 16)
    return -(-size // step) * step


def multiple_of(step: int) -> Bucket:
    """A bucket that rounds up to a multiple of ``step``."""
    arguments.whole("a bucket's step", step, 1)

    def bucket(size: int) -> int:
        return -(-size // step) * step

    return bucket
