"""What children do: run a command or call a reader, and say what they leave or read."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import signal
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llm_trm.cli.train.phase1_progress import ConsoleProgress
from tests.train.signals import send_to_commands


def command(arguments: list[str], damaged: bool = False) -> dict[str, Any]:
    """Run ``llm-trm``; returns its exit code, and what is wrong with the files that it leaves.

    Args:
        arguments: The command line.
        damaged: Whether the working directory has damaged files, which a command may replace, or leave.
    """
    from llm_trm.cli import main

    before = _files(Path())
    try:
        main.main(arguments, prog_name="llm-trm")
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    faults = _faults_of_files(before, refused=code == 2 and not damaged)
    return {"code": 0 if code is None else code, "faults": faults}


def commands(lines: list[list[str]]) -> list[str]:
    """Run several commands, which must succeed; returns the modules that they imported."""
    for arguments in lines:
        found = command(arguments)
        if found["code"] not in (0, None) and "solve" not in arguments:
            raise RuntimeError(f"{arguments} failed with {found}")
    return list(sys.modules)


def interrupted(lines: list[list[str]]) -> None:
    """Run trainings that are stopped after their first step, so that they leave a checkpoint to resume."""
    with pytest.MonkeyPatch.context() as patch:
        send_to_commands(patch, at=1, number=signal.SIGTERM)
        patch.setattr(ConsoleProgress, "training", lambda *_: signal.raise_signal(signal.SIGTERM))
        for arguments in lines:
            if command(arguments)["code"] != 128 + signal.SIGTERM:
                raise RuntimeError(f"{arguments} was not interrupted")


def reading(function: str, folder: str) -> dict[str, Any]:
    """Call a reader, ``"module:name"``, with a folder; returns the error or a digest of what it returned."""
    from llm_trm.errors import InputError

    module, _, name = function.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(Path(folder))
    except InputError as error:
        return {"code": 2, "message": str(error)}
    content = Content()
    content.add(value)
    return {"code": 0, "faults": content.faults, "digest": content.digest}


class Content:
    """The numbers and strings in a value: a digest, and which of them are not finite."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.faults: list[str] = []

    @property
    def digest(self) -> str:
        """The same for the same values."""
        return self._hash.hexdigest()

    def add(self, value: Any, name: str = "it") -> None:
        """Add a value and all that it consists of."""
        if isinstance(value, Tensor):
            value = value.detach().contiguous().cpu()
            self._add_array(value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy(), name)
        elif isinstance(value, np.ndarray):
            self._add_array(value, name)
        elif isinstance(value, nn.Module):
            self.add(dict(value.state_dict()), name)
        elif is_dataclass(value) and not isinstance(value, type):
            self.add({field.name: getattr(value, field.name) for field in fields(value)}, name)
        elif isinstance(value, Mapping):
            for key, one in value.items():
                self._hash.update(str(key).encode(errors="backslashreplace"))
                self.add(one, f"{name}.{key}")
        elif isinstance(value, (list, tuple)):
            for number, one in enumerate(value):
                self.add(one, f"{name}[{number}]")
        elif isinstance(value, float):
            if not math.isfinite(value):
                self.faults.append(f"{name} is {value}")
            self._hash.update(repr(value).encode())
        elif isinstance(value, (str, int, Path, type(None))):
            self._hash.update(repr(value).encode())

    def _add_array(self, array: np.ndarray[Any, Any], name: str) -> None:
        if array.dtype == object:
            self.add(array.tolist(), name)
            return
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            self.faults.append(f"{name} has NaN or infinity")
        self._hash.update(np.ascontiguousarray(array).tobytes())


def _files(folder: Path) -> dict[Path, int]:
    # A folder may contain links to itself.
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def _faults_of_files(before: Mapping[Path, int], *, refused: bool) -> list[str]:
    """What is wrong with files that a command has left in the working directory."""
    faults = []
    for path, changed in _files(Path()).items():
        new = path not in before
        if new and path.name.startswith("."):
            faults.append(f"{path} is left over")
        if new and path.is_dir() and not any(path.iterdir()):
            faults.append(f"{path} is an empty folder")
        if refused and new and path.is_file():
            faults.append(f"{path} was written, though the command was refused")
        if refused and not new and path.is_file() and before[path] != changed:
            faults.append(f"{path} was changed, though the command was refused")
        # Lines are appended to damaged files.
        if path.is_file() and before.get(path) != changed and (new or path.suffix != ".jsonl"):
            faults += [f"{path}: {name}" for name in _not_finite(path)]
    return faults


def _not_finite(path: Path) -> Iterable[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    yield f"{name} has NaN or infinity"
    elif path.suffix in (".json", ".jsonl"):
        found: list[str] = []
        text = path.read_text(encoding="utf-8")
        for line in text.split("\n") if path.suffix == ".jsonl" else [text]:
            if line.strip():
                json.loads(line, parse_constant=found.append)
        yield from found
