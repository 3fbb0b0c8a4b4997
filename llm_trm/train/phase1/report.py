"""What phase 1 reports: progress, and the result of each stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from llm_trm.errors import InputError
from llm_trm.ranges import FINITE, PLACE, require_ranges
from llm_trm.train.phase1.config import Stage
from llm_trm.train.phase1.reconstruction import Quality
from llm_trm.train.run.settings import START_OVER


@dataclass(frozen=True)
class StageResult:
    """A trained compressor.

    Attributes:
        stage: ``"1a"`` or ``"1b"``.
        size: D' of a dimension compressor, M of a latent one.
        ratio: D / D', or the mean length of a sequence over M.
        folder: Folder of the compressor.
        learned: Quality of the compressor on the held-out states.
        reference: Quality on the same states of PCA of the training states (dimension), or of their mean
            (latent), which a decoder reaches that learns nothing from the latents.
        training_mse: MSE of the compressor on the training states.
        training_bound: MSE of the reference on the training states. No linear compressor is below PCA.
        epochs: Epochs until the lowest validation error; 0 is the start.
    """

    stage: Stage
    size: Annotated[int, PLACE]
    ratio: Annotated[float, FINITE]
    folder: Path
    learned: Quality
    reference: Quality
    training_mse: Annotated[float, FINITE]
    training_bound: Annotated[float, FINITE]
    epochs: Annotated[int, PLACE]

    def record(self) -> dict[str, Any]:
        """The result as JSON values, without the folder."""
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
        """The result that :meth:`record` returned.

        Raises:
            InputError: A value is missing or of the wrong type.
        """
        try:
            result = cls(
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
            for part in (result.learned, result.reference, result):
                require_ranges(part)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder} does not record how its compressor was made: {START_OVER}") from error
        return result


class Progress:
    """Follows a run of phase 1; this one is silent."""

    def say(self, line: str) -> None:
        """A line of text for the user."""

    def states(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` states of a part are computed."""

    def training(self, what: str, done: int, total: int, loss: float, cosine: float) -> None:
        """``done`` of ``total`` steps are made: their relative squared error, and the last validation."""
