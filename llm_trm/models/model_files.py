"""The two files of a model: its weights, and its kind, sizes and facts as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from llm_trm.errors import InputError, one_line
from llm_trm.files import read_object, write_json
from llm_trm.publishing import publishing
from llm_trm.weights import read_tensors, require_size, write_tensors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ModelFiles:
    """How a kind of model is stored in a folder, as ``stem.safetensors`` and ``stem.json``.

    Attributes:
        kind: Name of the model's class.
        stem: Name of both files without the suffix.
        remedy: End of the messages about missing and invalid files.
    """

    kind: str
    stem: str
    remedy: str

    def write(
        self, folder: Path, model: nn.Module, config: DataclassInstance, facts: Mapping[str, Any]
    ) -> None:
        """Write weights and sizes into ``folder``, and ``facts`` (JSON values) with the sizes.

        A model that is there stays until the new one is whole.
        """
        sizes = f"{self.stem}.json"
        with publishing(folder, sizes) as temporary:
            write_tensors(temporary / f"{self.stem}.safetensors", model.state_dict())
            write_json(temporary / sizes, {"kind": self.kind, **asdict(config), "facts": facts})

    def read(
        self, folder: Path, config: type[C], size: Callable[[C], int], build: Callable[[C], M]
    ) -> tuple[M, dict[str, Any]]:
        """Load a model, in eval mode, and its facts.

        Args:
            config: Dataclass of the sizes.
            size: Number of elements that a model of these sizes has. It is compared with the weights before
                the model is built, because a model that a file describes may not fit into memory.
            build: Makes a model of these sizes.

        Raises:
            InputError: A file is missing or invalid, or describes another kind of model.
        """
        path = folder / f"{self.stem}.json"
        described = read_object(path, self.remedy)
        try:
            kind, facts = described.pop("kind"), dict(described.pop("facts"))
            if kind != self.kind:
                raise InputError(f"{path} describes a {kind}, not a {self.kind}: {self.remedy}")
            tensors = read_tensors(folder / f"{self.stem}.safetensors", self.remedy)
            sizes = config(**described)
            require_size(path, size(sizes), tensors, self.remedy)
            model = build(sizes)
            model.load_state_dict(tensors)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{folder} does not contain a {self.kind} ({one_line(error)}): {self.remedy}"
            ) from error
        return model.eval(), facts
