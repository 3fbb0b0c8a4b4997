"""The digest of weights: it changes if, and only if, any of the weights changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.common import INSTRUCTION_SETS, kernels_of
from trm_kernels import NetworkConfig

#: Sizes around a stripe of 256 bytes and a block of 64 KiB.
SIZES = (0, 1, 3, 4, 255, 256, 257, 512, 65535, 65536, 65537, 200_001)


def digest(*tensors: Tensor, name: str = "portable", threads: int = 1) -> tuple[int, int]:
    kernels = kernels_of(NetworkConfig(16, 1, 1), name)
    found: tuple[int, int] = kernels.digest(
        [tensor.data_ptr() for tensor in tensors], [tensor.nbytes for tensor in tensors], threads
    )
    return found


def drawn(size: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("size", SIZES)
def test_instruction_sets_threads_and_addresses_agree(name: str, size: int) -> None:
    data, offset = drawn(size), torch.empty(size + 1, dtype=torch.uint8)
    moved = offset[1:].copy_(data)
    expected = digest(data, drawn(300))
    for threads in (1, 2, 3):
        assert digest(data, drawn(300), name=name, threads=threads) == expected
        assert digest(moved, drawn(300), name=name, threads=threads) == expected


@settings(max_examples=200)
@given(data=st.data(), size=st.sampled_from([size for size in SIZES if size > 3]))
def test_a_change_of_one_bit_changes_both_numbers(data: st.DataObject, size: int) -> None:
    tensor = drawn(size)
    before = digest(tensor)
    tensor[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    after = digest(tensor)
    assert before[0] != after[0] and before[1] != after[1]


@settings(max_examples=200)
@given(data=st.data(), size=st.sampled_from((512, 65536, 200_001)))
def test_swapped_words_show(data: st.DataObject, size: int) -> None:
    words = drawn(size)[: size // 4 * 4].view(torch.int32)
    first, second = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    before = digest(words)
    words[[first, second]] = words[[second, first]]
    after = digest(words)
    assert (before == after) == (words[first] == words[second]).item()


def test_changes_that_a_sum_would_not_see_show() -> None:
    """Rows, columns, signs, complete 64 KiB blocks, zeros; tensor boundaries show in the shapes."""
    weight = torch.randn(256, 128)
    seen = {
        digest(weight),
        digest(weight.roll(1, 0)),
        digest(weight.roll(1, 1)),
        digest(weight.flip(0)),
        digest(weight.T.contiguous()),
        digest(-weight),
        digest(torch.cat((weight[128:], weight[:128]))),
        digest(torch.zeros(1), weight),
        digest(weight, torch.zeros(1)),
    }
    assert len(seen) == 9


def test_random_changes_of_two_words_of_one_chain_do_not_cancel() -> None:
    """Words that are 64 apart enter the same 32-bit chain."""
    words = torch.randint(-(2**31), 2**31, (1024,), dtype=torch.int64).to(torch.int32)
    seen = set()
    for _ in range(3000):
        words[5::64] = torch.randint(-(2**31), 2**31, (16,), dtype=torch.int64).to(torch.int32)
        seen.add(digest(words))
    assert len(seen) == 3000


def test_it_does_not_read_past_the_end() -> None:
    whole = drawn(1000)
    part = whole[100:600]
    before = digest(part)
    whole[:100], whole[600:] = 7, 9
    assert digest(part) == before


def test_mismatched_sizes_are_rejected() -> None:
    kernels = kernels_of(NetworkConfig(16, 1, 1), "portable")
    with pytest.raises(ValueError, match="sizes and addresses must have the same length"):
        kernels.digest([0], [], 1)
    with pytest.raises(ValueError, match="negative"):
        kernels.digest([0], [-1], 1)
    with pytest.raises(ValueError, match="threads"):
        kernels.digest([0], [0], 0)
