"""Benchmark cases and their amount of work. Does not import torch, so that help is fast."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trm_kernels.config import NetworkConfig

Mode = Literal["forward", "train", "step"]

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

#: Number of classes of a training step's head: those of a Sudoku cell, including padding (as in the paper).
CLASSES = 11


@dataclass(frozen=True)
class Case:
    """One unit of work to measure on a tiny network.

    Attributes:
        mode: ``"forward"`` is one latent recursion without gradients: n + 1 calls of the network.
            ``"train"`` is one supervision step: gradients set to None, a deep recursion (T - 1 latent
            recursions without gradients, one with), and the backward pass from a given gradient of y to
            the parameters and x, without the optimizer's step. ``"step"`` is a whole training step: the
            same deep recursion on a given x, then norm, head and cross-entropy, the backward pass to the
            parameters, gradient clipping, AdamW and an exponential moving average of the parameters.
        hidden_size: Width D.
        latents: Sequence length L.
        batch: Batch size B.
        dtype: Dtype of all tensors. For a whole training step, only of the matrix products: parameters and
            optimizer state are float32.
        steps: Number n of latent steps per latent recursion.
        recursions: Number T of latent recursions per deep recursion.
    """

    mode: Mode
    hidden_size: int
    latents: int
    batch: int = 1
    layers: int = 2
    heads: int = 8
    dtype: str = "float32"
    family: str = "seed"
    steps: int = 6
    recursions: int = 3

    @property
    def name(self) -> str:
        """Name that identifies the case in results."""
        return (
            f"{self.family} {self.mode} d{self.hidden_size} L{self.latents} B{self.batch} "
            f"layers{self.layers} heads{self.heads} {_SHORT_DTYPE[self.dtype]}"
        )

    def to_json(self) -> dict[str, Any]:
        """The fields, for a results file."""
        return asdict(self)

    def config(self) -> NetworkConfig:
        """The network's configuration. Raises ValueError if the fields are invalid."""
        from trm_kernels.config import NetworkConfig

        return NetworkConfig(
            self.hidden_size,
            self.layers,
            self.heads,
            family=self.family,  # type: ignore[arg-type]
        )

    @property
    def parameter_dtype(self) -> str:
        """Dtype of the parameters: float32 if an optimizer updates them."""
        return "float32" if self.mode == "step" else self.dtype

    @property
    def stream_dtype(self) -> str:
        """Dtype of x, y and z. A whole step in low precision has float32 streams, as with autocast, except
        for the paper's model, whose streams are in low precision."""
        return "float32" if self.mode == "step" and self.family != "paper" else self.dtype

    @property
    def forward_calls(self) -> int:
        """Number of network calls in the forward pass."""
        return (self.steps + 1) * (1 if self.mode == "forward" else self.recursions)

    @property
    def backward_calls(self) -> int:
        """Number of network calls in the backward pass."""
        return 0 if self.mode == "forward" else self.steps + 1

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, two per multiply-add.

        A backward pass counts as twice its forward pass. Norms, activations and softmax are not counted.
        """
        config = self.config()
        d, matrices = config.d_model, 3 if config.gated else 2
        projections = 2 * self.batch * self.latents * (4 * d * d + matrices * d * config.d_ff)
        attention = 4 * self.batch * self.latents**2 * d
        return self.in_all_calls(config.n_layers * (projections + attention))

    def in_all_calls(self, call: int) -> int:
        """Operations of the case, if one call of the network needs ``call`` operations."""
        head = 6 * self.batch * self.latents * self.hidden_size * CLASSES if self.mode == "step" else 0
        return call * (self.forward_calls + 2 * self.backward_calls) + head

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        return self.config().parameters

    @property
    def least_bytes(self) -> int:
        """Bytes of the parameters and the states x, y and z, a lower bound of the memory of a run."""
        states = 3 * self.batch * self.latents * self.hidden_size * ELEMENT_BYTES[self.stream_dtype]
        return self.parameters * ELEMENT_BYTES[self.parameter_dtype] + states

    def bytes_moved(self, cache_bytes: int) -> int:
        """Lower bound of the main-memory traffic in bytes.

        x, y and z are read once and y and z are written once. ``train`` also reads the gradient of y and
        writes the gradients of x and of every parameter. A whole step reads and writes every parameter, its
        average and AdamW's two moments. The parameters are read once, or once per forward and backward call
        of the network if they do not fit the last-level cache of ``cache_bytes``. Intermediate results are
        not counted, because a kernel may keep them on the chip or recompute them.
        """
        size = ELEMENT_BYTES[self.stream_dtype]
        parameters = self.parameters * ELEMENT_BYTES[self.parameter_dtype]
        reads = 1 if parameters <= cache_bytes else self.forward_calls + self.backward_calls
        states = {"forward": 5, "train": 7, "step": 5}[self.mode]
        updates = {"forward": 0, "train": 1, "step": 7}[self.mode]
        return states * self.batch * self.latents * self.hidden_size * size + parameters * (reads + updates)
