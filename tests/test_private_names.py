"""All private names of other packages that we use exist and are listed in CONTRIBUTING.md."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Rows of the table: ``| `package.Class._name` | `file`, ... |``.
_ROW = re.compile(r"^\| `((?:transformers|trl|peft|accelerate)\.\w+\._\w+)` \| ([^|]+) \|", re.MULTILINE)
#: Packages with classes from which ours inherit.
_FOREIGN = ("transformers", "trl", "peft", "accelerate")


def _table() -> dict[str, list[str]]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return {name: re.findall(r"`([^`]+)`", files) for name, files in _ROW.findall(text)}


@pytest.mark.parametrize("name", sorted(_table()))
def test_it_exists_and_is_used(name: str) -> None:
    package, owner, private = name.split(".")
    found: Any = getattr(importlib.import_module(package), owner)
    # Instance attributes are set in the source of the class.
    classes = [one for one in inspect.getmro(found) if one.__module__.split(".")[0] == package]
    assert hasattr(found, private) or any(
        re.search(rf"\bself\.{private}\b", inspect.getsource(one)) for one in classes
    ), f"{name} is gone: what used it no longer works, or is never called"
    for file in _table()[name]:
        assert re.search(rf"\b{private}\b", (ROOT / "llm_trm" / file).read_text()), f"{file} has no {private}"


def _overrides() -> Iterator[tuple[str, str]]:
    """Yield private names of other packages' classes that our classes override."""
    from llm_trm.models import causal
    from llm_trm.models.causal.adapters import TRMPeftModel
    from llm_trm.train.lora.callbacks import FollowEpochs, KeepBest, WriteFacts
    from llm_trm.train.lora.trainer import LatentTrainer
    from llm_trm.train.phase3.trainer import LatentGRPOTrainer
    from llm_trm.train.run.trainer import TrainerRun

    exported = [value for value in vars(causal).values() if inspect.isclass(value)]
    callbacks = (FollowEpochs, KeepBest, TrainerRun, WriteFacts)
    for ours in {*exported, TRMPeftModel, LatentTrainer, LatentGRPOTrainer, *callbacks}:
        mro = inspect.getmro(ours)
        own = [one for one in mro if one.__module__.split(".")[0] == "llm_trm"]
        foreign = [one for one in mro if one.__module__.split(".")[0] in _FOREIGN]
        for name in {name for one in own for name in vars(one)}:
            private = name.startswith("_") and not name.endswith("__") and not name.startswith("_abc_")
            if private and any(name in vars(one) for one in foreign):
                yield ours.__name__, name


def test_every_override_is_listed() -> None:
    listed = {name.rpartition(".")[2] for name in _table()}
    assert listed, "the table was not found"
    assert not {f"{owner}.{name}" for owner, name in _overrides() if name not in listed}
