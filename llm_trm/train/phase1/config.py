"""Settings of phase 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm_trm.errors import InputError
from llm_trm.ranges import (
    BATCH,
    COUNT,
    LEARNING_RATE,
    LENGTH,
    SEED,
    SHARE_WITHIN,
    TOKENS,
    WIDTH,
)
from llm_trm.settings import setting
from llm_trm.shared_settings import trust_remote_code
from llm_trm.train.run import settings as run
from llm_trm.train.run.settings import RunSettings

Stage = Literal["1a", "1b"]
Kind = Literal["dimension", "latent"]

#: Defaults of ``text`` and ``traces`` by stage, for all models except the arithmetic one.
DEFAULT_DATASETS: dict[Stage, str] = {
    "1a": "HuggingFaceFW/fineweb-edu:sample-10BT",
    "1b": "open-r1/OpenR1-Math-220k",
}


@dataclass(frozen=True)
class Phase1Config(RunSettings):
    """Settings of a :class:`~llm_trm.train.phase1.trainer.CompressorPretrainer`.

    Raises:
        InputError: A value out of range, or settings that contradict each other.
    """

    COMMAND = "phase1"

    output: Path = run.output(
        "runs/phase1",
        "Folder for the compressors: in its subfolders 1a and 1b, or with --sweep in d32/1a and so on.",
    )
    model: str = setting(
        "arithmetic",
        "Language model: arithmetic, which is bundled, a folder, or a name on the Hugging Face hub.",
    )
    stage: Literal["1a", "1b", "both"] = setting(
        "both", "Stage 1a trains on text; stage 1b continues from 1a on thinking traces."
    )
    compressor: Kind = setting(
        "dimension",
        "dimension narrows every hidden state by a linear map; latent pools a sequence of states into a few.",
    )
    d_compressed: int | None = setting(
        None, "Width D' of compressed states.", WIDTH, unset="D/4 for D up to 512, else 256"
    )
    num_latents: int | None = setting(
        None, "Number of latents of --compressor latent.", LENGTH, unset="8 for D up to 512, else 256"
    )
    sweep: tuple[int, ...] = setting(
        (), "Train one compressor per width, for example 32,64,96.", WIDTH, metavar="WIDTHS"
    )
    text: str | None = setting(
        None,
        "Text for stage 1a: a .txt or .jsonl file, or a dataset on the hub, NAME or NAME:SUBSET.",
        unset=f"arithmetic problems for --model arithmetic, else {DEFAULT_DATASETS['1a']}",
    )
    traces: str | None = setting(
        None,
        "Traces for stage 1b: a .jsonl file with question, thinking and answer, a folder from llm-trm "
        "datagen, or chats on the hub.",
        unset=f"worked problems for --model arithmetic, else {DEFAULT_DATASETS['1b']}",
    )
    start: Path | None = setting(
        None, "Compressor to start --stage 1b from.", None, "--from", unset="stage 1a in --output"
    )
    num_tokens: int | None = setting(
        None,
        "Hidden states per stage to train and validate on.",
        TOKENS,
        unset="100000 for D up to 512, else 1000000",
    )
    max_length: int | None = setting(
        None,
        "Maximum length of a text in tokens; longer texts are split.",
        LENGTH,
        unset="512, or the model's context if that is shorter",
    )
    lm_batch_size: int = setting(16, "Texts per forward pass of the language model.", BATCH)
    val_fraction: float = setting(
        0.1, "Fraction of the texts to hold out for validation.", SHARE_WITHIN, was=("--held-out",)
    )
    epochs: int = setting(20, "Maximum number of passes over the states.", COUNT)
    patience: int = setting(5, "Stop after this many epochs without a lower validation error.", COUNT)
    batch_size: int | None = setting(
        None, "Batch size over all processes.", BATCH, unset="1024 states, or 32 sequences for latent"
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate: linear warm-up, then cosine decay.",
        LEARNING_RATE,
        unset="0.2/sqrt(D), or 0.03/sqrt(D) for latent",
    )
    init: Literal["orthogonal", "pca"] = setting(
        "orthogonal", "Initial weights of stage 1a; pca is the optimum of a linear compressor."
    )
    seed: int = setting(0, "Seed of the weights and the data order.", SEED)
    states: Path | None = setting(
        None, "Folder for the hidden states, which other runs can share.", unset="states in --output"
    )
    keep_states: bool = setting(
        True, "Whether to keep the hidden states for other runs.", None, "--keep-states/--drop-states"
    )
    trust_remote_code: bool = trust_remote_code()
    overwrite: bool = setting(
        False,
        "Replace compressors that were made with other settings, and restart an interrupted stage.",
        action=True,
        kw_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        latent = self.compressor == "latent"
        contradictions = {
            "--d-compressed is the width of a dimension compressor: use --num-latents": latent
            and self.d_compressed is not None,
            "--sweep tries widths of a dimension compressor: leave it out, or --compressor latent": latent
            and bool(self.sweep),
            "--init pca is for a dimension compressor: leave it out": latent and self.init == "pca",
            "--num-latents is for a latent compressor: add --compressor latent": not latent
            and self.num_latents is not None,
            "--sweep names the widths: leave --d-compressed out": bool(self.sweep)
            and self.d_compressed is not None,
            "--from is where stage 1b starts: use it with --stage 1b and without --sweep": self.start
            is not None
            and (self.stage != "1b" or bool(self.sweep)),
        }
        for message, contradicted in contradictions.items():
            if contradicted:
                raise InputError(message)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages to train, in order."""
        return ("1a", "1b") if self.stage == "both" else (self.stage,)
