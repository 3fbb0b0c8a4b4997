"""Resolves the sizes of an imported model from several sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_trm.errors import InputError
from llm_trm.models.puzzle.official_config import CONFIG_FILE, read_config

TENSORS = "its tensors"


class SizeResolver:
    """Resolves the value of each size, records its origin, and collects missing ones.

    Args:
        path: The checkpoint.

    Attributes:
        configured: Values in ``all_config.yaml`` next to the checkpoint.
        origins: Origin of each size by name: the tensors, an option, ``all_config.yaml``, or a default.

    Raises:
        InputError: ``all_config.yaml`` is invalid, or describes another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.configured, self._unreadable = read_config(path)
        self.origins: dict[str, str] = {}
        self._missing: list[str] = []

    def resolve(
        self, name: str, option: str = "", given: Any = None, *, fixed: Any = None, default: Any = None
    ) -> Any:
        """The value of ``name``; None if it is missing, which :meth:`finish` reports.

        Args:
            name: The size.
            option: The caller's option for it: ``"--heads"``, or with values, ``"--grid ROWSxCOLUMNS"``.
            given: The caller's value, which takes precedence over the configuration.
            fixed: The value given by the tensors, which all other values must match.
            default: Value to use if no other source has one.

        Raises:
            InputError: A value contradicts the tensors.
        """
        by_others = ((given, option.split(" ")[0]), (self.configured.get(name), CONFIG_FILE))
        if fixed is not None:
            for value, origin in by_others:
                if value is not None and value != fixed:
                    raise InputError(
                        f"{self.path} has {name} {fixed}, but {origin} has {value}: use the checkpoint's"
                    )
        for value, origin in (
            (fixed, TENSORS),
            *by_others,
            (default, "defaults of the official code"),
        ):
            if value is not None:
                self.origins[name] = origin
                return value
        self.require_option(option)
        return None

    def require_option(self, option: str) -> None:
        """Record that ``option`` is required."""
        self._missing.append(option)

    def finish(self) -> None:
        """Raise InputError if anything is missing."""
        if self._missing:
            raise InputError(
                f"the tensors of {self.path} and the {CONFIG_FILE} next to it do not give all sizes of the "
                f"model{self._unreadable}: pass {', '.join(self._missing)}"
            )
