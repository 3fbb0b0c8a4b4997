"""Phase 1: trains a compressor of a frozen language model's hidden states to lose as little as possible.

Stage 1a trains on the states of text, and stage 1b continues on those of thinking traces. The states are
computed once (:mod:`llm_trm.train.phase1.states`); then the language model is released, and only the small
compressor is trained. A run leaves one folder per stage with the compressor
(:func:`llm_trm.models.compression.load_compressor`).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_trm.claims import claimed
from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.files import require_writable, sweep, writable_folder, write_json
from llm_trm.memory import require_training_memory
from llm_trm.models.compression import (
    FACTS_FILE,
    Compressor,
    DimensionCompressor,
    LatentAttentionCompressor,
    LatentDecoder,
    compressor_facts,
    kind_of,
    load_compressor,
    require_width,
    save_compressor,
)
from llm_trm.models.loading import load_thinking_model
from llm_trm.train.phase1.config import Phase1Config, Stage
from llm_trm.train.phase1.fit import Fit, Material, every_batch, fit
from llm_trm.train.phase1.inputs import SMALL_WIDTH, StageInputs, collect, read_stage
from llm_trm.train.phase1.reconstruction import Quality, Reconstruction, quality
from llm_trm.train.phase1.report import Progress, StageResult
from llm_trm.train.phase1.states import StateFiles, remove_states
from llm_trm.train.phase1.unfinished import Unfinished
from llm_trm.train.run.interruption import Interruption
from llm_trm.train.run.settings import START_OVER
from llm_trm.train.run.tracking import finish_tracking, new_accelerator, start_tracking
from llm_trm.weights import read_tensors, write_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

#: The auxiliary decoder of a latent compressor, from which a later stage continues.
DECODER_FILE = "decoder.safetensors"
SWEEP_FILE, SWEEP_PLOT = "sweep.json", "sweep.png"

#: Steps between which processes agree whether one of them was interrupted.
_AGREE_EVERY = 20


class CompressorPretrainer:
    """Trains compressors by a :class:`Phase1Config`, in one process or several (``accelerate launch``).

    Args:
        config: Settings.
        progress: Follows the run, in the main process.

    Raises:
        InputError: A package is missing, or the output folder cannot be written.
    """

    def __init__(self, config: Phase1Config, progress: Progress | None = None) -> None:
        require("train", "transformers", "accelerate")
        if config.sweep:
            require("plot", "matplotlib")
        self.config = config
        if config.resume and not (config.output / config.FILE).exists():
            raise InputError(f"{config.output} holds no run to resume: leave --resume out")
        require_writable(config.output)
        if config.states is not None:
            require_writable(config.states)
        self.accelerator: Accelerator = new_accelerator(config.track, config.output, device=config.device)
        self.progress = progress if progress and self.accelerator.is_main_process else Progress()
        self.interruption = Interruption(config, _AGREE_EVERY)
        self._latent = config.compressor == "latent"
        self._steps = 0

    def train(self) -> list[StageResult]:
        """Train every stage of every width; a compressor that the same settings made before is kept.

        Returns:
            Results, width by width, stage by stage. After a sweep, ``sweep.json`` and ``sweep.png`` show
            those of the last stage.

        Raises:
            InputError: Bad texts, states, sizes or files, or another process writes in the output folder;
                nothing was overwritten.
            Interrupted: Ctrl-C or SIGTERM. Finished stages, hidden states and the progress of the stage are
                kept, so that the same settings continue from there.
        """
        with claimed(self.config.output, main=self.accelerator.is_main_process):
            return self._train()

    def _train(self) -> list[StageResult]:
        config = self.config
        model = load_thinking_model(
            config.model, self.accelerator.device, trust_remote_code=config.trust_remote_code
        )
        width = model.hidden_size
        sizes = self._sizes(width)
        stages = {stage: read_stage(config, stage, model) for stage in config.stages}
        for size in sizes:
            for stage, inputs in stages.items():
                self._made_before(stage, size, self._settings(stage, width, inputs))
            if config.stages == ("1b",):
                self._starting_point(size, width)
        if self.accelerator.is_main_process:
            write_json(config.output / config.FILE, config.record())
            for folder in {self._folder(stage, size) for size in sizes for stage in stages}:
                sweep(folder)
        materials = {
            stage: collect(config, inputs, model, self.accelerator, self.progress)
            for stage, inputs in stages.items()
        }
        del model  # what is trained from here on may need the memory
        start_tracking(self.accelerator, "llm-trm-phase1", config.record())
        with self.interruption:
            results = [
                self._train_stage(stage, size, width, materials[stage], self._settings(stage, width, inputs))
                for size in sizes
                for stage, inputs in stages.items()
            ]
        finish_tracking(self.accelerator)
        if self.accelerator.is_main_process:
            if config.sweep:
                self._write_sweep(results)
            if not config.keep_states:
                for folder in {folder for inputs in stages.values() for folder in inputs.folders}:
                    remove_states(folder)
        return results

    def _sizes(self, width: int) -> tuple[int, ...]:
        """D' or M of every compressor to train; InputError if one does not fit in memory."""
        config, small = self.config, width <= SMALL_WIDTH
        if self._latent:
            default = 8 if small else 256
            asked: tuple[int, ...] = () if config.num_latents is None else (config.num_latents,)
        else:
            default = max(1, width // 4) if small else 256
            asked = config.sweep or (() if config.d_compressed is None else (config.d_compressed,))
        for size in asked:
            with torch.device("meta"):
                compressor = self._new_compressor(width, size)
            numbers = sum(parameter.numel() for parameter in compressor.parameters())
            require_training_memory(
                numbers,
                f"training a compressor of {numbers:,} numbers",
                "choose a lower --num-latents or --d-compressed",
                self.accelerator.device,
            )
        return asked or (default,)

    def _fit_settings(self, width: int) -> Fit:
        config, latent = self.config, self._latent
        # A compressor's entries are about 1 / sqrt(D), and Adam's steps about as large as the learning rate.
        peak = (0.03 if latent else 0.2) / math.sqrt(width)
        return Fit(
            sequences=latent,
            batch_size=config.batch_size or (32 if latent else 1024),
            learning_rate=config.learning_rate or peak,
            # Weight decay would pull the rows of a tied compressor away from unit length.
            weight_decay=0.01 if latent else 0.0,
            epochs=config.epochs,
            patience=config.patience,
            seed=config.seed,
        )

    def _new_compressor(self, width: int, size: int) -> Compressor:
        return LatentAttentionCompressor(width, size) if self._latent else DimensionCompressor(width, size)

    def _folder(self, stage: Stage, size: int) -> Path:
        return (self.config.output / f"d{size}" if self.config.sweep else self.config.output) / stage

    def _settings(self, stage: Stage, width: int, inputs: StageInputs) -> dict[str, Any]:
        """Everything that the compressor of a stage depends on, except kind, size and initial weights."""
        config = self.config
        begins = {"init": config.init} if stage == "1a" else {"from": str(config.start or "stage 1a")}
        training, held_out = inputs.folders
        states = {"training_states": training.name, "held_out_states": held_out.name}
        return {"model": config.model, **states, **asdict(self._fit_settings(width)), **begins}

    def _made_before(self, stage: Stage, size: int, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Facts of a compressor that these settings made before; InputError if other settings did."""
        folder = self._folder(stage, size)
        if not (folder / FACTS_FILE).exists():
            return None
        facts = compressor_facts(folder)
        recorded = facts.get("settings", {})
        if not isinstance(recorded, dict):
            raise InputError(f"{folder / FACTS_FILE} holds no settings by name: {START_OVER}")
        made = {"compressor": facts["kind"], "size": facts.get("size"), **recorded}
        for name, value in {"compressor": self.config.compressor, "size": size, **settings}.items():
            if made.get(name) != value:
                if self.config.overwrite:
                    return None
                raise InputError(
                    f"{folder} contains a compressor made with other settings ({name} was {made.get(name)} "
                    f"and is {value}): "
                    "add --overwrite, or choose another --output"
                )
        return facts

    def _starting_point(self, size: int, width: int) -> tuple[Compressor, str]:
        """The compressor that stage 1b starts from, and the hash of its weights."""
        config = self.config
        folder = config.start or self._folder("1a", size)
        if config.start is None and not (folder / FACTS_FILE).exists():
            raise InputError(
                f"{folder} contains no compressor to start stage 1b from: train it with --stage 1a, or name "
                "one with --from"
            )
        compressor = load_compressor(folder)
        require_width(compressor, width, folder, f"model {config.model}")
        latent = isinstance(compressor, LatentAttentionCompressor)
        found = compressor.num_latents if latent else compressor.d_compressed
        if (latent, found) != (self._latent, size):
            raise InputError(
                f"{folder} contains a {kind_of(compressor)} compressor of size {found}, not a "
                f"{config.compressor} compressor of size {size}: name another with --from, or ask for its "
                "kind and size"
            )
        return compressor, compressor_facts(folder)["weights_sha256"]

    def _module(
        self, stage: Stage, size: int, width: int, material: Material
    ) -> tuple[Reconstruction, str | None]:
        """The module that a stage trains, and the hash of the weights that it starts from."""
        initial_hash: str | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            if stage == "1b":
                compressor, initial_hash = self._starting_point(size, width)
            else:
                compressor = self._new_compressor(width, size)
                if self.config.init == "pca":
                    compressor.load_state_dict({"compress.weight": material.components.projection(size)})
            if not isinstance(compressor, LatentAttentionCompressor):
                return Reconstruction(compressor), initial_hash
            decoder = LatentDecoder(width, compressor.d_latent, compressor.n_heads)
        before = (self.config.start or self._folder("1a", size)) / DECODER_FILE
        if stage == "1b" and before.exists():
            decoder.load_state_dict(read_tensors(before, "delete it, because a new one can be trained"))
        return Reconstruction(compressor, decoder), initial_hash

    def _train_stage(
        self, stage: Stage, size: int, width: int, material: Material, settings: dict[str, Any]
    ) -> StageResult:
        folder, before = self._folder(stage, size), self._made_before(stage, size, settings)
        module, initial_hash = self._module(stage, size, width, material)
        if before is not None and before.get("started_from") == initial_hash:
            self.progress.say(f"{folder}: kept, because it was made with the same settings")
            return StageResult.from_record(before, folder)
        what = f"stage {stage}, {f'{size} latents' if self._latent else f'width {size}'}"
        unfinished = Unfinished(folder, {**settings, "size": size, "started_from": initial_hash})
        if self.config.overwrite and self.accelerator.is_main_process:
            unfinished.remove()
        self.accelerator.wait_for_everyone()
        epochs, steps = fit(
            module,
            material,
            self._fit_settings(width),
            self.accelerator,
            self.progress,
            what,
            first_step=self._steps,
            unfinished=unfinished,
            interruption=self.interruption,
        )
        self._steps += steps
        reference, bound = self._reference(size, width, material)
        training = material.training
        result = StageResult(
            stage=stage,
            size=size,
            ratio=training.rows / training.sequences / size if self._latent else width / size,
            folder=folder,
            learned=self._quality(module, material.validation),
            reference=reference,
            training_mse=self._quality(module, training).mse,
            training_bound=bound,
            epochs=epochs,
        )
        if self.accelerator.is_main_process:
            writable_folder(folder)
            if module.decoder is not None:
                write_tensors(folder / DECODER_FILE, module.decoder.state_dict())
            facts = {
                "model": self.config.model,
                **result.record(),
                "started_from": initial_hash,
                "settings": settings,
            }
            save_compressor(module.compressor, folder, **facts)
        self.accelerator.wait_for_everyone()
        return result

    def _reference(self, size: int, width: int, material: Material) -> tuple[Quality, float]:
        """The reference of :class:`StageResult`: its quality on held-out states, and its training error."""
        if self._latent:
            mean = material.moments.mean.float().to(self.accelerator.device)
            bound = material.moments.power - float(material.moments.mean.square().mean())
            batches = every_batch(material.validation, True, self.accelerator.device)
            return quality(lambda states, mask: mean.expand_as(states), batches), bound
        best = DimensionCompressor(width, size)
        best.load_state_dict({"compress.weight": material.components.projection(size)})
        best.to(self.accelerator.device)
        return self._quality(Reconstruction(best), material.validation), material.components.mse(size)

    def _quality(self, module: Reconstruction, files: StateFiles) -> Quality:
        return quality(module, every_batch(files, self._latent, self.accelerator.device))

    def _write_sweep(self, results: list[StageResult]) -> None:
        from llm_trm.train.phase1.curves import plot_sweep

        last = [result for result in results if result.stage == self.config.stages[-1]]
        rows = [{**result.record(), "folder": str(result.folder)} for result in last]
        write_json(self.config.output / SWEEP_FILE, {"model": self.config.model, "results": rows})
        plot_sweep(last, self.config.output / SWEEP_PLOT)
