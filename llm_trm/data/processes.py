"""The processes that ``accelerate launch`` started, or the one that it did not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch

from llm_trm.extras import require

#: How long a process waits for the slowest one, which may have a whole shard more to do.
_PATIENCE = timedelta(days=7)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Processes:
    """This process among ``count``.

    Attributes:
        index: 0 is the main process.
        local_index: On this machine.
        wait: Returns when every process has called it.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    wait: Callable[[], None] = _nothing

    @property
    def is_main(self) -> bool:
        """Whether this one writes what is written once."""
        return self.index == 0

    def place(self, device: torch.device) -> torch.device:
        """This process's own of several GPUs."""
        if device.type != "cuda" or self.count == 1:
            return device
        return torch.device("cuda", self.local_index % torch.cuda.device_count())


def launched_processes() -> Processes:
    """The processes of this launch, joined over gloo: they share files, and only wait for one another."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    require("train", "accelerate")
    from accelerate import PartialState

    state = PartialState(cpu=True, backend="gloo", timeout=_PATIENCE)
    return Processes(
        state.process_index, state.num_processes, state.local_process_index, state.wait_for_everyone
    )
