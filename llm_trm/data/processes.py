"""The processes of a run: those that ``accelerate launch`` started, or this one alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch

from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.ranges import PORT, PROCESSES, Whole, require_in

#: How long a process waits for the slowest one, which may have a whole shard more to generate.
_TIMEOUT = timedelta(days=7)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Processes:
    """This process among ``count``.

    Attributes:
        index: Rank of the process; 0 is the main process.
        local_index: Rank on this machine.
        wait: Barrier, which returns once every process has called it.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    wait: Callable[[], None] = _nothing

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the shared files."""
        return self.index == 0

    def place(self, device: torch.device) -> torch.device:
        """This process's GPU if there are several processes, else ``device``."""
        if device.type != "cuda" or self.count == 1:
            return device
        return torch.device("cuda", self.local_index % torch.cuda.device_count())


def world_size() -> int:
    """Number of processes of this launch.

    Raises:
        InputError: An environment variable of the launcher is not an integer, or out of range.
    """
    count = _variable("WORLD_SIZE", 1, PROCESSES)
    if count > 1:  # accelerate reads these as well
        for name in ("RANK", "LOCAL_RANK"):
            _variable(name, 0, Whole(0, count - 1))
        _variable("MASTER_PORT", 1, PORT)
    return count


def main_process() -> bool:
    """Whether this is the main process of the launch. Unlike :func:`launched_processes`, connects nothing."""
    count = world_size()
    return count == 1 or _variable("RANK", 0, Whole(0, count - 1)) == 0


def _variable(name: str, default: int, within: Whole) -> int:
    text = os.environ.get(name, str(default))
    value = int(text) if re.fullmatch("-?[0-9]{1,20}", text) else text
    require_in(within, name, value, InputError, "the environment variable ")
    return int(value)


def launched_processes() -> Processes:
    """The processes of this launch, connected with gloo: they share files and only wait for each other."""
    if world_size() == 1:
        return Processes()
    require("train", "accelerate")
    from accelerate import PartialState

    state = PartialState(cpu=True, backend="gloo", timeout=_TIMEOUT)
    return Processes(
        state.process_index, state.num_processes, state.local_process_index, state.wait_for_everyone
    )
