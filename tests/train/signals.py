"""Signals that reach a training at a step, as Ctrl-C and the end of a job do."""

from __future__ import annotations

import signal

import pytest

from llm_trm.cli.train import console
from llm_trm.train.run.report import Report


class SignalAt(Report):
    """Sends this process a signal at a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.at, self.number = step, number

    def step(self, step: int) -> None:
        if step == self.at:
            signal.raise_signal(self.number)


def send_to_commands(monkeypatch: pytest.MonkeyPatch, at: int, number: int) -> None:
    """Send a signal to this process when a command of ``llm-trm train`` has made step ``at``."""
    before = console.ConsoleReport.step

    def step(self: console.ConsoleReport, step: int) -> None:
        before(self, step)
        if step == at:
            signal.raise_signal(number)

    monkeypatch.setattr(console.ConsoleReport, "step", step)
