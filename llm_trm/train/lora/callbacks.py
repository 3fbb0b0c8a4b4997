"""What happens beside training with LoRA: checkpoints that can be loaded, and a file of metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llm_trm.data.lessons import prompts_fingerprint
from llm_trm.models.causal.card import About, inner, write_about
from llm_trm.train.lora.config import LoraTrainingConfig
from llm_trm.train.lora.model import Trainee
from llm_trm.train.run.tracking import json_tracker


class WriteFacts(TrainerCallback):
    """Makes checkpoints that ``load_latent_model`` reads."""

    def __init__(self, config: LoraTrainingConfig, trainee: Trainee) -> None:
        self._config, self._trainee = config, trainee

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            config, trainee = self._config, self._trainee
            known = About(
                config.model,
                trainee.form,
                {"training": config.record()},
                prompts=prompts_fingerprint(trainee.tokenizer, trainee.form),
            )
            inner(trainee.model).about = known
            write_about(trainee.model, folder)
            trainee.tokenizer.save_pretrained(folder)


class WriteMetrics(TrainerCallback):
    """Writes what is logged to ``metrics.jsonl``, from where the checkpoint ``resumed`` stood."""

    def __init__(self, folder: Path, resumed: Path | None) -> None:
        self._tracker = json_tracker(
            folder, None if resumed is None else int(resumed.name.rpartition("-")[2])
        )

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._tracker.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._tracker.log(logs, step=state.global_step)
