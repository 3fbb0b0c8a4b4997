"""What phase 1 is told, and what it tells: settings, results, progress."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llm_trm.errors import InputError
from llm_trm.models.loading import ARITHMETIC
from llm_trm.ranges import (
    BATCH,
    COUNT,
    LEARNING_RATE,
    LENGTH,
    SEED,
    SHARE_WITHIN,
    TOKENS,
    WIDTH,
    require_ranges,
)
from llm_trm.train.phase1.reconstruction import Quality
from llm_trm.train.run.tracking import Track

Stage = Literal["1a", "1b"]
Kind = Literal["dimension", "latent"]

#: What other models than the arithmetic world's learn from, by stage: prose, and chats that think.
DEFAULT_DATASETS: dict[Stage, str] = {
    "1a": "HuggingFaceFW/fineweb-edu:sample-10BT",
    "1b": "open-r1/OpenR1-Math-220k",
}


@dataclass(frozen=True)
class Phase1Config:
    """Settings of :class:`CompressorPretrainer`. None stands for a default that depends on the model.

    Attributes:
        output: Folder of the run: stage folders ``1a`` and ``1b``; of a sweep, in a folder a width.
        model: Name for :func:`llm_trm.models.loading.load_thinking_model`.
        stage: Or ``"both"``, one after the other.
        compressor: ``"dimension"`` or ``"latent"``.
        d_compressed: D' of a dimension compressor; D/4 for D up to 512, else 256.
        num_latents: M of a latent compressor; 8 for D up to 512, else 256.
        sweep: Values of D' to train one compressor each for, in place of ``d_compressed``.
        text, traces: What stages 1a and 1b learn from (:func:`llm_trm.train.phase1.texts.read_texts`); by
            default arithmetic problems for the arithmetic model, else :data:`DEFAULT_DATASETS`.
        start: Compressor that stage 1b starts from, if not ``output``'s own stage 1a.
        num_tokens: States to compute for a stage; 100,000 for D up to 512, else 1,000,000.
        max_length: Longest sequence that the language model reads, in tokens; 512, or its context if shorter.
        lm_batch_size: Sequences that it reads at once.
        held_out: Share of the texts that only validates.
        epochs: Most passes over the states.
        patience: Epochs without a better validation error after which training ends.
        batch_size: Of an optimizer step, over all processes; 1024 states, or 32 sequences (latent).
        learning_rate: Peak of warm-up and cosine; 0.2 / sqrt(D) (dimension) or 0.03 / sqrt(D) (latent).
        init: Start of a dimension compressor: ``"orthogonal"``, or ``"pca"``, the optimum itself.
        seed: Of weights and order.
        device: ``"cpu"`` keeps off the accelerators; any other value takes what accelerate finds.
        track: Where the curves go (:mod:`llm_trm.train.run.tracking`).
        states: Folder of the computed states; ``output/states``.
        keep_states: Whether they stay for the next run.
        trust_remote_code: Run the Python files that the language model brings, if it needs them.
        overwrite: Replace compressors that other settings made.

    Raises:
        InputError: Settings that contradict one another.
    """

    output: Path
    model: str = ARITHMETIC
    stage: Literal["1a", "1b", "both"] = "both"
    compressor: Kind = "dimension"
    d_compressed: Annotated[int, WIDTH] | None = None
    num_latents: Annotated[int, LENGTH] | None = None
    sweep: tuple[int, ...] = ()
    text: str | None = None
    traces: str | None = None
    start: Path | None = None
    num_tokens: Annotated[int, TOKENS] | None = None
    max_length: Annotated[int, LENGTH] | None = None
    lm_batch_size: Annotated[int, BATCH] = 16
    held_out: Annotated[float, SHARE_WITHIN] = 0.1
    epochs: Annotated[int, COUNT] = 20
    patience: Annotated[int, COUNT] = 5
    batch_size: Annotated[int, BATCH] | None = None
    learning_rate: Annotated[float, LEARNING_RATE] | None = None
    init: Literal["orthogonal", "pca"] = "orthogonal"
    seed: Annotated[int, SEED] = 0
    device: str = "auto"
    track: Track | None = None
    states: Path | None = None
    keep_states: bool = True
    trust_remote_code: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_ranges(self, InputError)
        latent = self.compressor == "latent"
        contradictions = {
            "--d-compressed is the width of a dimension compressor: use --num-latents": latent
            and self.d_compressed is not None,
            "--sweep tries widths of a dimension compressor: leave it out, or --compressor latent": latent
            and bool(self.sweep),
            "--init pca is the start of a dimension compressor: leave it out": latent and self.init == "pca",
            "--num-latents is of a latent compressor: add --compressor latent": not latent
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


@dataclass(frozen=True)
class StageResult:
    """A trained compressor.

    Attributes:
        stage: ``"1a"`` or ``"1b"``.
        size: D' of a dimension compressor, M of a latent one.
        ratio: D / D', or the mean length of a sequence over M.
        folder: Where it lies.
        learned: Of the compressor, on the held-out states.
        reference: On the same states, of the PCA of the training states (dimension), or of their mean
            (latent), which is what a decoder can reach that learns nothing from the latents.
        training_mse: Of the compressor, on the training states.
        training_bound: On the same states, of the reference. No linear compressor is below that of PCA.
        epochs: Passes until the best validation error; 0 is the start.
    """

    stage: Stage
    size: int
    ratio: float
    folder: Path
    learned: Quality
    reference: Quality
    training_mse: float
    training_bound: float
    epochs: int

    def record(self) -> dict[str, Any]:
        """The result as JSON, without its folder."""
        return {
            "stage": self.stage,
            "size": self.size,
            "compression_ratio": self.ratio,
            "metrics": asdict(self.learned),
            "reference": asdict(self.reference),
            "training_mse": self.training_mse,
            "training_bound": self.training_bound,
            "epochs": self.epochs,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any], folder: Path) -> StageResult:
        """The result that :meth:`record` gave."""
        return cls(
            stage=record["stage"],
            size=record["size"],
            ratio=record["compression_ratio"],
            folder=folder,
            learned=Quality(**record["metrics"]),
            reference=Quality(**record["reference"]),
            training_mse=record["training_mse"],
            training_bound=record["training_bound"],
            epochs=record["epochs"],
        )


class Progress:
    """What a run tells on the way. This one keeps silent."""

    def say(self, line: str) -> None:
        """Something happened."""

    def states(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` states are computed."""

    def training(self, what: str, done: int, total: int, loss: float, cosine: float) -> None:
        """``done`` of ``total`` steps; the relative squared error of the last ones, the last validation."""
