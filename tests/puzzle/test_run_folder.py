"""Tests that the error for an invalid run folder names the command that writes a complete one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_trm.errors import InputError
from llm_trm.models.phase2 import load_phase2
from llm_trm.models.puzzle.loading import load_puzzle


@pytest.mark.parametrize(("load", "command"), [(load_puzzle, "train puzzle"), (load_phase2, "train phase2")])
@pytest.mark.parametrize("content", ["{", "[]", '{"best": null}', '{"best": "../elsewhere"}'])
def test_the_remedy_names_the_command(
    load: Callable[[Path], Any], command: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(InputError, match=rf"index\.json.*llm-trm {command}"):
        load(tmp_path)
