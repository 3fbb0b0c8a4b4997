"""Phase 1: trains a compressor of a frozen language model's states to lose as little of them as it can.

Stage 1a learns on the states of text, stage 1b goes on from there on those of thinking traces. The states
are computed once (:mod:`llm_trm.train.phase1.states`); then the language model is let go, and what is trained
is small. A run leaves a folder a stage with the compressor
(:func:`llm_trm.models.compression.load_compressor`).
"""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.files import read_tensors, writable_folder, write_json, write_tensors
from llm_trm.memory import require_memory, require_training_memory
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
from llm_trm.models.loading import ARITHMETIC, ThinkingModel, load_thinking_model
from llm_trm.train.phase1.config import DEFAULT_DATASETS, Phase1Config, Stage
from llm_trm.train.phase1.fit import Fit, Material, every_batch, fit
from llm_trm.train.phase1.pca import moments
from llm_trm.train.phase1.reconstruction import Quality, Reconstruction, quality
from llm_trm.train.phase1.report import Progress, StageResult
from llm_trm.train.phase1.states import StateFiles, collect_states, fingerprint, write_index
from llm_trm.train.phase1.texts import arithmetic_texts, read_texts, tokenised
from llm_trm.train.run.tracking import finish_tracking, new_accelerator, start_tracking

if TYPE_CHECKING:
    from accelerate import Accelerator

#: The throw-away decoder of a latent compressor, from which a later stage goes on.
DECODER_FILE = "decoder.safetensors"
SWEEP_FILE, SWEEP_PLOT = "sweep.json", "sweep.png"

#: States up to this width count as those of a small model, which has smaller defaults.
_SMALL_WIDTH = 512
_MAX_LENGTH = 512
#: Of the arithmetic world's texts in memory, at least: a tensor and a hash for some forty tokens.
_BYTES_A_TOKEN = 8
_MOMENT_ROWS = 8192

#: Token sequences to learn from, and to validate on.
_Corpus = tuple[list[Tensor], list[Tensor]]


class CompressorPretrainer:
    """Trains compressors as a :class:`Phase1Config` says, on one process or several (``accelerate launch``).

    Args:
        config: What to train.
        progress: Is told what happens, in the main process.

    Raises:
        InputError: A package is missing, or the output folder cannot be written.
    """

    def __init__(self, config: Phase1Config, progress: Progress | None = None) -> None:
        require("train", "transformers", "accelerate")
        if config.sweep:
            require("plot", "matplotlib")
        self.config = config
        writable_folder(config.output)
        self.accelerator: Accelerator = new_accelerator(config.track, config.output, device=config.device)
        self.progress = progress if progress and self.accelerator.is_main_process else Progress()
        self._latent = config.compressor == "latent"
        self._steps = 0

    def train(self) -> list[StageResult]:
        """Train every stage of every width; a compressor that the same settings made before is kept.

        Returns:
            Results, width by width, stage by stage. Of a sweep, ``sweep.json`` and ``sweep.png`` show those
            of the last stage.

        Raises:
            InputError: Bad texts, states, sizes or files; nothing was overwritten.
        """
        config = self.config
        model = load_thinking_model(
            config.model, self.accelerator.device, trust_remote_code=config.trust_remote_code
        )
        width = model.hidden_size
        sizes = self._sizes(width)
        corpora = {stage: self._corpus(stage, model) for stage in config.stages}
        folders = {stage: self._state_folders(model, corpus) for stage, corpus in corpora.items()}
        for size in sizes:
            for stage in config.stages:
                self._made_before(stage, size, self._settings(stage, width, folders[stage]))
            if config.stages == ("1b",):
                self._starting_point(size, width)
        materials = {
            stage: self._material(stage, model, corpora[stage], folders[stage]) for stage in config.stages
        }
        # What is trained from here on may need the memory.
        del model, corpora
        start_tracking(self.accelerator, "llm-trm-phase1", config.record())
        results = [
            self._train_stage(
                stage, size, width, materials[stage], self._settings(stage, width, folders[stage])
            )
            for size in sizes
            for stage in config.stages
        ]
        finish_tracking(self.accelerator)
        if self.accelerator.is_main_process:
            if config.sweep:
                self._write_sweep(results)
            if not config.keep_states:
                for folder in {folder for pair in folders.values() for folder in pair}:
                    shutil.rmtree(folder, ignore_errors=True)
        return results

    def _sizes(self, width: int) -> tuple[int, ...]:
        """D' or M of every compressor to train; InputError if one is out of range."""
        config, small = self.config, width <= _SMALL_WIDTH
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
        # A compressor's entries are of the order of 1 / sqrt(D), Adam's steps of that of the learning rate.
        peak = (0.03 if latent else 0.2) / math.sqrt(width)
        return Fit(
            sequences=latent,
            batch_size=config.batch_size or (32 if latent else 1024),
            learning_rate=config.learning_rate or peak,
            # Decay would pull the rows of a tied compressor away from unit length.
            weight_decay=0.01 if latent else 0.0,
            epochs=config.epochs,
            patience=config.patience,
            seed=config.seed,
        )

    def _new_compressor(self, width: int, size: int) -> Compressor:
        return LatentAttentionCompressor(width, size) if self._latent else DimensionCompressor(width, size)

    def _corpus(self, stage: Stage, model: ThinkingModel) -> _Corpus:
        """What a stage reads, each side in a fixed random order."""
        config, thinking = self.config, stage == "1b"
        positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", _MAX_LENGTH)
        max_length = config.max_length or min(_MAX_LENGTH, positions)
        if max_length > positions:
            raise InputError(
                f"--max-length {max_length}: model {model.name} reads at most {positions} tokens: "
                "take no more"
            )
        source = config.traces if thinking else config.text
        if source is None and config.model == ARITHMETIC:
            texts = arithmetic_texts(model, config.seed, thinking=thinking)
        else:
            source = source or DEFAULT_DATASETS[stage]
            texts = read_texts(source, model, thinking=thinking)
        num_tokens = config.num_tokens or (100_000 if model.hidden_size <= _SMALL_WIDTH else 1_000_000)
        if source is None:  # The arithmetic world has no end.
            require_memory(_BYTES_A_TOKEN * num_tokens, f"{num_tokens:,} tokens", "choose fewer --num-tokens")
        corpus = tokenised(
            texts,
            model,
            max_length=max_length,
            num_tokens=num_tokens,
            held_out=config.val_fraction,
            source=source or "the arithmetic world",
        )
        # A file may be sorted; a shard of states should be like any other.
        for side in corpus:
            random.Random(0).shuffle(side)
        return corpus

    def _state_folders(self, model: ThinkingModel, corpus: _Corpus) -> tuple[Path, Path]:
        parent = self.config.states or self.config.output / "states"
        training, validation = (parent / fingerprint(model, side) for side in corpus)
        return training, validation

    def _material(
        self, stage: Stage, model: ThinkingModel, corpus: _Corpus, folders: tuple[Path, Path]
    ) -> Material:
        for what, sequences, folder in zip(("training", "held-out"), corpus, folders, strict=True):
            collect_states(
                model,
                sequences,
                folder,
                batch_size=self.config.lm_batch_size,
                process=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
                progress=partial(self.progress.states, f"stage {stage}, {what} states"),
            )
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_index(model, sequences, folder)
            self.accelerator.wait_for_everyone()
        training, validation = map(StateFiles.open, folders)
        rows = (rows.to(self.accelerator.device) for rows in training.batches(_MOMENT_ROWS))
        return Material(training, validation, moments(rows))

    def _folder(self, stage: Stage, size: int) -> Path:
        return (self.config.output / f"d{size}" if self.config.sweep else self.config.output) / stage

    def _settings(self, stage: Stage, width: int, folders: tuple[Path, Path]) -> dict[str, Any]:
        """All that the compressor of a stage depends on, apart from kind, size and where it starts."""
        config = self.config
        begins = {"init": config.init} if stage == "1a" else {"from": str(config.start or "stage 1a")}
        states = {"training_states": folders[0].name, "held_out_states": folders[1].name}
        return {"model": config.model, **states, **asdict(self._fit_settings(width)), **begins}

    def _made_before(self, stage: Stage, size: int, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Facts of a compressor that these settings made before; InputError if others did."""
        folder = self._folder(stage, size)
        if not (folder / FACTS_FILE).exists():
            return None
        facts = compressor_facts(folder)
        made = {"compressor": facts["kind"], "size": facts.get("size"), **facts.get("settings", {})}
        for name, value in {"compressor": self.config.compressor, "size": size, **settings}.items():
            if made.get(name) != value:
                if self.config.overwrite:
                    return None
                raise InputError(
                    f"{folder} holds a compressor of other settings ({name} {made.get(name)}, now {value}): "
                    "add --overwrite, or choose another --output"
                )
        return facts

    def _starting_point(self, size: int, width: int) -> tuple[Compressor, str]:
        """What stage 1b starts from, and the hash of its weights."""
        config = self.config
        folder = config.start or self._folder("1a", size)
        if config.start is None and not (folder / FACTS_FILE).exists():
            raise InputError(
                f"{folder} holds no compressor to start stage 1b from: train it with --stage 1a, or name one "
                "with --from"
            )
        compressor = load_compressor(folder)
        require_width(compressor, width, folder, f"model {config.model}")
        latent = isinstance(compressor, LatentAttentionCompressor)
        found = compressor.num_latents if latent else compressor.d_compressed
        if (latent, found) != (self._latent, size):
            raise InputError(
                f"{folder} holds a {kind_of(compressor)} compressor of size {found}, not a "
                f"{config.compressor} compressor of size {size}: name another with --from, or ask for its "
                "kind and size"
            )
        return compressor, compressor_facts(folder)["weights_sha256"]

    def _module(
        self, stage: Stage, size: int, width: int, material: Material
    ) -> tuple[Reconstruction, str | None]:
        """What a stage trains, at its start, and the hash of the weights that it starts from."""
        begun: str | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            if stage == "1b":
                compressor, begun = self._starting_point(size, width)
            else:
                compressor = self._new_compressor(width, size)
                if self.config.init == "pca":
                    compressor.load_state_dict({"compress.weight": material.components.projection(size)})
            if not isinstance(compressor, LatentAttentionCompressor):
                return Reconstruction(compressor), begun
            decoder = LatentDecoder(width, compressor.d_latent, compressor.n_heads)
        before = (self.config.start or self._folder("1a", size)) / DECODER_FILE
        if stage == "1b" and before.exists():
            decoder.load_state_dict(read_tensors(before, "delete it, since a new one can be learned"))
        return Reconstruction(compressor, decoder), begun

    def _train_stage(
        self, stage: Stage, size: int, width: int, material: Material, settings: dict[str, Any]
    ) -> StageResult:
        folder, before = self._folder(stage, size), self._made_before(stage, size, settings)
        module, begun = self._module(stage, size, width, material)
        if before is not None and before.get("started_from") == begun:
            self.progress.say(f"{folder}: kept, since the same settings made it before")
            return StageResult.from_record(before, folder)
        what = f"stage {stage}, {f'{size} latents' if self._latent else f'width {size}'}"
        epochs, steps = fit(
            module,
            material,
            self._fit_settings(width),
            self.accelerator,
            self.progress,
            what,
            first_step=self._steps,
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
                "started_from": begun,
                "settings": settings,
            }
            save_compressor(module.compressor, folder, **facts)
        self.accelerator.wait_for_everyone()
        return result

    def _reference(self, size: int, width: int, material: Material) -> tuple[Quality, float]:
        """What :class:`StageResult` compares with: its quality on held-out states, and training error."""
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
