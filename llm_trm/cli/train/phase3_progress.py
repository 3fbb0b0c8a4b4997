"""How ``llm-trm train phase3`` shows that it is at work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from llm_trm.cli.bars import training_bar
from llm_trm.train.phase3.report import Phase3Plan, Phase3Report


class ConsoleReport(Phase3Report):
    """A line a measurement on stdout, and on a terminal a bar on stderr, renewed with every step."""

    def __init__(self) -> None:
        self._bar = training_bar()
        self._console = Console(highlight=False, soft_wrap=True) if self._bar.disable else self._bar.console

    def begin(self, plan: Phase3Plan) -> None:
        problems, (trained, frozen) = plan.problems, plan.parameters
        self._console.print(
            f"{len(problems.training)} problems to train on, {len(problems.held_out)} held out; "
            f"{trained:,} parameters trained, {frozen:,} frozen; {plan.steps} steps of {plan.prompts} "
            f"problems x {plan.group_size} completions; {plan.device}"
        )
        if problems.dropped:
            self._console.print(f"{problems.dropped} problems left out: no answer that can be graded")
        if plan.start:
            self._console.print(f"resuming at step {plan.start + 1}")
        self._task = self._bar.add_task("", total=plan.steps, completed=plan.start, numbers="")
        self._bar.start()

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def record(self, record: Mapping[str, Any]) -> None:
        if "eval_accuracy" in record:
            self._console.print(
                f"step {record['step']:>5}  held out: {record['eval_accuracy']:.1%} right, "
                f"{record['eval_format']:.1%} of the form, {record['eval_tokens']:.1f} tokens"
            )
            return
        divergence = f"  kl {record['kl']:.4f}" if "kl" in record else ""
        self._console.print(
            f"step {record['step']:>5}  reward {record['reward']:.3f}  right "
            f"{record['rewards/correctness/mean']:.1%}  of the form {record['rewards/format/mean']:.1%}"
            f"{divergence}  gradient {record.get('grad_norm', 0.0):.3f}  "
            f"{record['completions/mean_length']:.1f} tokens  {1000 * record['step_time']:.0f} ms"
        )

    def end(self) -> None:
        self._bar.stop()
