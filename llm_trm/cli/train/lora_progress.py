"""How ``llm-trm train lora`` shows that it is at work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from llm_trm.cli.bars import training_bar
from llm_trm.train.lora.train import LoraPlan, LoraReport


class ConsoleReport(LoraReport):
    """A line an evaluation on stdout, and on a terminal a bar on stderr."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = training_bar()
        self.callback = _Follow(self._bar, self._console)

    def __enter__(self) -> ConsoleReport:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, plan: LoraPlan) -> None:
        added = f"; added to its tokenizer: {' '.join(plan.added)}" if plan.added else ""
        self._console.print(
            f"{plan.training:,} questions to train on ({plan.thinking:,} with written thinking), "
            f"{plan.held_out:,} held out, {plan.form} form{added}\n{plan.reasoner}; {plan.trainable:,} of "
            f"{plan.parameters:,} parameters are trained",
            markup=False,
        )
        if plan.left_out:
            self._console.print(f"left out, as longer than allowed: {plan.left_out:,} questions")
        if plan.shared:
            self._console.print(f"left out, as they are held out: {plan.shared:,} questions to train on")
        if plan.start:
            self._console.print(f"resuming at update {plan.start}")


class _Follow(TrainerCallback):
    def __init__(self, bar: Any, console: Console) -> None:
        self._bar, self._console = bar, console
        self._task: Any = None
        self._numbers = ""
        self._began, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self._task = self._bar.add_task(
                "", total=state.max_steps, completed=state.global_step, numbers=""
            )
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._task is not None and not self._bar.disable:
            self._bar.update(self._task, completed=state.global_step, numbers=self._numbers)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            took = (time.monotonic() - self._began) / max(1, state.global_step - self._first)
            self._numbers = (
                f"loss {logs['loss']:.4f}  rate {logs['learning_rate']:.1e}  {took:.2f} s an update"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        taken = time.monotonic() - self._began
        printer = self._console if self._bar.disable else self._bar.console
        updates = f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        printer.print(
            f"update {updates}  {held_out(metrics, 'eval_')}  {taken:.0f} s", markup=False, highlight=False
        )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._bar.stop()


def held_out(metrics: Mapping[str, float], prefix: str = "") -> str:
    """Figures of an evaluation, in a line."""
    words = [f"held out: loss {metrics[f'{prefix}loss']:.4f}"]
    for name, label, form in (
        ("answer_accuracy", "answers right", ".1%"),
        ("think_rate", "writes <think>", ".1%"),
        ("needless_think_rate", "needlessly", ".1%"),
        ("trm_steps", "steps", ".2f"),
        ("reconstruction_error", "lost by compression", ".2%"),
    ):
        if f"{prefix}{name}" in metrics:
            words.append(f"{label} {metrics[f'{prefix}{name}']:{form}}")
    return "  ".join(words)
