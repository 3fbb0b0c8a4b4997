"""Where the sizes of an imported model come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_trm.errors import InputError
from llm_trm.models.puzzle.official_config import CONFIG_FILE, read_config

TENSORS = "its tensors"


class Choice:
    """Picks a value for each size, remembers where it came from, and collects what is missing.

    Args:
        path: The checkpoint.

    Attributes:
        said: What ``all_config.yaml`` beside it says.
        origins: By the name of a size: tensors, an option, ``all_config.yaml``, a default.

    Raises:
        InputError: ``all_config.yaml`` is broken, or describes another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said, self._unreadable = read_config(path)
        self.origins: dict[str, str] = {}
        self._missing: list[str] = []

    def take(
        self, name: str, option: str = "", given: Any = None, *, fixed: Any = None, default: Any = None
    ) -> Any:
        """The value of ``name``; None if there is none, which :meth:`finish` reports.

        Args:
            name: The size.
            option: How the caller names it: ``"--heads"``, or with values, ``"--grid ROWSxCOLUMNS"``.
            given: The caller's value; wins over the configuration's.
            fixed: What the tensors say: with it others must agree.
            default: If nothing else says it.

        Raises:
            InputError: Something disagrees with the tensors.
        """
        by_others = ((given, option.split(" ")[0]), (self.said.get(name), CONFIG_FILE))
        if fixed is not None:
            for value, origin in by_others:
                if value is not None and value != fixed:
                    raise InputError(
                        f"{self.path} has {name} {fixed}, but {origin} says {value}: use one's own"
                    )
        for value, origin in (
            (fixed, TENSORS),
            *by_others,
            (default, "defaults of the official code"),
        ):
            if value is not None:
                self.origins[name] = origin
                return value
        self.lack(option)
        return None

    def lack(self, option: str) -> None:
        """Note that ``option`` is needed."""
        self._missing.append(option)

    def finish(self) -> None:
        """Raise InputError if anything is missing."""
        if self._missing:
            raise InputError(
                f"neither the tensors of {self.path} nor {CONFIG_FILE} beside it say all that a model needs"
                f"{self._unreadable}: give {', '.join(self._missing)}"
            )
