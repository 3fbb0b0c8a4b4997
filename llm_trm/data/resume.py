"""Resumes an interrupted generation by comparing the settings that it was started with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm_trm.data.pairs import INDEX
from llm_trm.errors import InputError
from llm_trm.files import read_json, write_json

SETTINGS = "settings.json"
_FORMAT = "llm-trm datagen settings"
_OWN = rf"(?:{re.escape(INDEX)}|{re.escape(SETTINGS)}|shard-\d{{5,}}\.(?:safetensors|jsonl))"
#: Temporary files that a killed process of an older version left; :func:`llm_trm.files.sweep` removes ours.
_LEFTOVER = rf"\.{_OWN}\.[A-Za-z0-9_]{{8}}|\.tmp[A-Za-z0-9]{{6}}"


def check_settings(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Raise InputError unless a run with ``settings`` may write to ``folder``. Does not write anything.

    Args:
        settings: All settings that determine the samples.
        overwrite: Whether the run starts over, so that other settings do not matter.
    """
    path = folder / SETTINGS
    if not path.exists():
        if not overwrite and (shard := next(folder.glob("shard-*"), None)):
            raise InputError(
                f"{shard} exists without a {SETTINGS}, so its settings are unknown: use --overwrite to start "
                "over, or another --output"
            )
        return
    found = read_json(path, "use another --output")
    before = found.get("settings", {}) if isinstance(found, dict) and found.get("format") == _FORMAT else None
    if not isinstance(before, dict):
        raise InputError(f"{path} was not written by llm-trm datagen: use another --output")
    changed = [
        f"{name} ({before.get(name)} before, {settings.get(name)} now)"
        for name in dict.fromkeys([*before, *settings])
        if before.get(name) != settings.get(name)
    ]
    if changed and not overwrite:
        raise InputError(
            f"{folder} was started with other settings: {', '.join(changed)}: use --overwrite to start over, "
            "or another --output"
        )


def start(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Remove temporary files of a killed run and, if ``overwrite``, old output, then write the settings.

    The old settings are replaced last, so that a process killed here leaves a folder that can be resumed.
    """
    # Sorting removes the index first, which marks the folder as incomplete.
    for path in sorted(folder.iterdir()):
        own = re.fullmatch(_OWN, path.name) and path.name != SETTINGS
        if re.fullmatch(_LEFTOVER, path.name) or (overwrite and own):
            path.unlink()
    write_json(folder / SETTINGS, {"format": _FORMAT, "settings": settings})
