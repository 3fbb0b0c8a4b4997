"""What a stage of phase 1 reads before it trains: texts, and a language model's hidden states of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from llm_trm.claims import claimed
from llm_trm.errors import InputError
from llm_trm.memory import require_memory
from llm_trm.models.loading import ARITHMETIC, ThinkingModel
from llm_trm.train.phase1.config import DEFAULT_DATASETS, Phase1Config, Stage
from llm_trm.train.phase1.fit import Material
from llm_trm.train.phase1.pca import moments
from llm_trm.train.phase1.report import Progress
from llm_trm.train.phase1.states import (
    StateFiles,
    collect_states,
    fingerprint,
    is_complete,
    write_index,
)
from llm_trm.train.phase1.texts import arithmetic_texts, read_texts, tokenised

if TYPE_CHECKING:
    from accelerate import Accelerator

#: A model with states up to this width counts as small, and has smaller defaults.
SMALL_WIDTH = 512
_MAX_LENGTH = 512
#: Least memory per token of the arithmetic world's texts: a tensor and a hash for about forty tokens.
_BYTES_PER_TOKEN = 8
_MOMENT_ROWS = 8192


@dataclass(frozen=True)
class StageInputs:
    """What a stage reads.

    Attributes:
        stage: ``"1a"`` or ``"1b"``.
        training, held_out: Token sequences, in a fixed random order.
        folders: Folders of their hidden states.
    """

    stage: Stage
    training: list[Tensor]
    held_out: list[Tensor]
    folders: tuple[Path, Path]


def read_stage(config: Phase1Config, stage: Stage, model: ThinkingModel) -> StageInputs:
    """Read and tokenise the texts of a stage.

    Raises:
        InputError: Texts that cannot be read, too few of them, or a length beyond the model's context.
    """
    thinking = stage == "1b"
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", _MAX_LENGTH)
    max_length = config.max_length or min(_MAX_LENGTH, positions)
    if max_length > positions:
        raise InputError(
            f"--max-length {max_length}: model {model.name} reads at most {positions} tokens: choose a lower "
            "value"
        )
    num_tokens = config.num_tokens or (100_000 if model.hidden_size <= SMALL_WIDTH else 1_000_000)
    source = config.traces if thinking else config.text
    if source is None and config.model == ARITHMETIC:
        texts = arithmetic_texts(model, config.seed, thinking=thinking)  # endless
        require_memory(_BYTES_PER_TOKEN * num_tokens, f"{num_tokens:,} tokens", "choose fewer --num-tokens")
    else:
        source = source or DEFAULT_DATASETS[stage]
        texts = read_texts(source, model, thinking=thinking)
    sides = tokenised(
        texts,
        model,
        max_length=max_length,
        num_tokens=num_tokens,
        held_out=config.val_fraction,
        source=source or "the arithmetic world",
    )
    # A file may be sorted, but a shard of states should be like any other.
    for side in sides:
        random.Random(0).shuffle(side)
    parent = config.states or config.output / "states"
    training, held_out = sides
    folders = parent / fingerprint(model, training), parent / fingerprint(model, held_out)
    return StageInputs(stage, training, held_out, folders)


def collect(
    config: Phase1Config,
    inputs: StageInputs,
    model: ThinkingModel,
    accelerator: Accelerator,
    progress: Progress,
) -> Material:
    """Compute the hidden states of a stage that are not on disk yet, and open them."""
    sides = (("training", inputs.training), ("held-out", inputs.held_out))
    for (what, sequences), folder in zip(sides, inputs.folders, strict=True):
        complete = is_complete(sequences, folder)
        accelerator.wait_for_everyone()  # every process has looked before one writes
        if complete:
            continue
        # Runs may share the folder.
        with claimed(folder, main=accelerator.is_main_process):
            collect_states(
                model,
                sequences,
                folder,
                batch_size=config.lm_batch_size,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
                progress=partial(progress.states, f"stage {inputs.stage}, {what} states"),
            )
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_index(model, sequences, folder)
            accelerator.wait_for_everyone()
    training, held_out = map(StateFiles.open, inputs.folders)
    rows = (rows.to(accelerator.device) for rows in training.batches(_MOMENT_ROWS))
    return Material(training, held_out, moments(rows))
