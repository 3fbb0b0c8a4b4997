"""What is measured: cases, the work they hold, and the suites. Imports no torch, so that help is quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trm_kernels.config import NetworkConfig

Mode = Literal["forward", "train"]

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

#: Above this width a training step takes many seconds on a CPU, so the default leaves it out there.
CPU_TRAIN_WIDTH = 512


@dataclass(frozen=True)
class Case:
    """One measured unit of work on a tiny network.

    Attributes:
        mode: ``"forward"`` is one latent recursion without gradient: n + 1 calls of the network.
            ``"train"`` is one supervision step: gradients set to None, a deep recursion (T - 1 latent
            recursions without gradient, one with), and the backward pass from a given gradient of y to
            the parameters and x. The optimizer's step is no part of it.
        hidden_size: Width D.
        latents: Sequence length L.
        batch: Batch size B.
        steps: n, the latent steps of one latent recursion.
        recursions: T, the latent recursions of one deep recursion.
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
        """Identifies the case in results; equal for equal cases."""
        return (
            f"{self.family} {self.mode} d{self.hidden_size} L{self.latents} B{self.batch} "
            f"layers{self.layers} heads{self.heads} {_SHORT_DTYPE[self.dtype]}"
        )

    def to_json(self) -> dict[str, Any]:
        """The fields, for a results file."""
        return asdict(self)

    def config(self) -> NetworkConfig:
        """The network; raises ValueError where the fields describe none."""
        from trm_kernels.config import NetworkConfig

        return NetworkConfig(
            self.hidden_size,
            self.layers,
            self.heads,
            family=self.family,  # type: ignore[arg-type]
        )

    @property
    def forward_calls(self) -> int:
        """Calls of the network in the forward pass."""
        return (self.steps + 1) * (self.recursions if self.mode == "train" else 1)

    @property
    def backward_calls(self) -> int:
        """Calls of the network that a backward pass runs through."""
        return self.steps + 1 if self.mode == "train" else 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, two for a multiply-add.

        A backward pass counts twice its forward pass; norms, activations and softmax are not counted.
        """
        config = self.config()
        d, matrices = config.d_model, 3 if config.gated else 2
        projections = 2 * self.batch * self.latents * (4 * d * d + matrices * d * config.d_ff)
        attention = 4 * self.batch * self.latents**2 * d
        call = config.n_layers * (projections + attention)
        return call * (self.forward_calls + 2 * self.backward_calls)

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        import torch

        from trm_kernels import reference

        with torch.device("meta"):
            net = reference.TinyRecursiveNetwork(self.config())
        return sum(parameter.numel() for parameter in net.parameters())

    def bytes_moved(self, cache_bytes: int) -> int:
        """Fewest bytes that must cross main memory.

        x, y and z are read and y and z written once; training also reads the gradient of y and writes
        that of x and of every parameter. The parameters are read once, or once in each forward and
        backward call of the network if they do not fit the last-level cache of ``cache_bytes``. Nothing
        in between counts: a kernel may keep it on the chip or compute it again.
        """
        size = ELEMENT_BYTES[self.dtype]
        parameters = self.parameters * size
        reads = 1 if parameters <= cache_bytes else self.forward_calls + self.backward_calls
        training = self.mode == "train"
        states = (7 if training else 5) * self.batch * self.latents * self.hidden_size * size
        return states + parameters * (reads + training)


#: Suite name -> what it holds, in the order of ``--help``.
SUITES = {
    "quick": "d 64, L 32, batch 2: a smoke test",
    "default": "d 256 and d 2048 at L 256, batch 1",
    "phase2": "d 256, L 256, batch 1 and 32 (CPU: 1 and 4): the recursion over compressed states",
    "latents": "d 2048, L 256, batch 1 and 8 (CPU: 1, forward only): over SmolLM3's own width",
    "paper": "d 512, L 97, batch 768 (CPU: 4), the paper's block: Sudoku with 16 puzzle positions",
    "all": "phase2, latents and paper",
}


def suite(name: str, device: str, dtype: str, modes: Sequence[Mode]) -> list[Case]:
    """The cases of a suite on a device type, most telling first."""
    cpu = device == "cpu"
    if name == "all":
        return [case for part in ("phase2", "latents", "paper") for case in suite(part, device, dtype, modes)]
    shapes = {
        "quick": [Case("forward", 64, 32, batch=2, heads=4)],
        "default": [Case("forward", 256, 256), Case("forward", 2048, 256)],
        "phase2": [Case("forward", 256, 256, batch=batch) for batch in ((1, 4) if cpu else (1, 32))],
        "latents": [Case("forward", 2048, 256, batch=batch) for batch in ((1,) if cpu else (1, 8))],
        "paper": [Case("forward", 512, 97, batch=4 if cpu else 768, family="paper")],
    }[name]
    return [
        replace(shape, mode=mode, dtype=dtype)
        for shape in shapes
        for mode in modes
        if not (cpu and mode == "train" and shape.hidden_size > CPU_TRAIN_WIDTH)
    ]
