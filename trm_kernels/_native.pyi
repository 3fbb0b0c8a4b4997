"""The C++ kernels for CPUs (csrc/). Tensors are passed as addresses of float32 data, 0 for none.

This module neither validates addresses nor keeps their memory alive. The R rows are the valid positions of
all samples, one after another; D is the width. Sizes are in floats. Import torch first: the module uses
torch's OpenMP.
"""

def instruction_sets() -> list[str]:
    """Return the instruction sets that both this build and this machine support, best first."""

def default_instruction_set() -> str:
    """Return the default instruction set of a :class:`Network`: TRM_NATIVE_ISA, or else the best one.

    Raises:
        ValueError: If TRM_NATIVE_ISA is not supported here.
    """

def fma_peak(seconds: float, threads: int, name: str | None = None) -> float:
    """Measure GF/s of independent multiply-adds in registers, per thread, with ``threads`` warm threads.

    Raises:
        ValueError: If instruction set ``name`` is not supported here, or if ``threads`` is less than 1.
    """

def tile_rate(seconds: float, threads: int, name: str | None = None) -> float:
    """Measure GF/s of the micro-kernel on data in the L1 cache, as :func:`fma_peak` does.

    It needs twice the instructions of :func:`fma_peak` per multiply-add, which reveals whether another thread
    runs on the same core.
    """

class Batch:
    """A batch of ``samples`` row ranges: sample s has the rows ``starts[s]`` to ``starts[s + 1]``.

    Args:
        rows: Number of rows R.
        starts: int32 [samples + 1].
        cos: RoPE table [longest, head size / 2] by position; 0 without RoPE. ``sin`` likewise.
        positions: Position of each row in its sample, int32 [R]; 0: rows are consecutive positions.
    """

    def __init__(self, rows: int, samples: int, starts: int, cos: int, sin: int, positions: int) -> None: ...

class Recursion:
    """Computes z = net(x + y + z) ``steps`` times, then y = net(y + z).

    Args:
        x: [R, D]; 0 if ``steps`` is 0.
        y: [R, D].
        z: [R, D]; 0 if ``steps`` is 0 and only y is an input.
        output_norm: Weight [D] of a norm after every call of the network, or 0.
        output_eps: Epsilon of that norm; negative for no norm.
        dropout: Probability of dropping an attention weight, in [0, 1).
        seed: Seed of the dropout, in [0, 2**64).
        recompute: Save only the inputs of calls, and run each call again in the backward.
    """

    def __init__(
        self,
        steps: int,
        x: int,
        y: int,
        z: int,
        output_norm: int,
        output_eps: float,
        dropout: float,
        seed: int,
        recompute: bool,
    ) -> None: ...

class Network:
    """The shape of a network and the kernels that run it. Immutable and thread-safe.

    Args:
        width: Width D.
        inner: Inner width F of the MLP.
        pre_norm: h + f(norm(h)) if True, norm(h + f(h)) if False.
        gated: SwiGLU if True, GELU if False.
        rotary: Whether attention uses RoPE (NeoX layout).
        eps: Epsilon of every norm of a block.
        length: Length of the samples if an MLP over positions replaces attention; 0 for attention.
        token_inner: Inner width of that MLP: SwiGLU if post-norm, GELU with biases if pre-norm.
        instruction_set: One of :func:`instruction_sets`; None for :func:`default_instruction_set`.

    Raises:
        ValueError: If the instruction set is not supported here, or if sizes are inconsistent.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        blocks: int,
        pre_norm: bool,
        gated: bool,
        rotary: bool,
        eps: float,
        length: int = 0,
        token_inner: int = 0,
        instruction_set: str | None = None,
    ) -> None: ...
    @property
    def instruction_set(self) -> str: ...
    @property
    def vector(self) -> int:
        """Number of floats per vector register."""

    def packed_size(self, backward: bool) -> int: ...
    def kept_size(self, batch: Batch, recursion: Recursion) -> int: ...
    def workspace_size(self, batch: Batch, recursion: Recursion, backward: bool, threads: int) -> int: ...
    def pack(self, parameters: list[int], backward: bool, packed: int, threads: int) -> None:
        """Write the weights to ``packed`` in the layout that the kernels read.

        Args:
            parameters: For each block norm1 [D], qkv [3 D, D], qkv_bias, out [D, D], out_bias, norm2 [D],
                up [F or 2 F, D], up_bias, down [D, F], down_bias; 0 for those that the network does not have.
                The MLP of a token mixer takes the positions of qkv and out.
            backward: Whether to also write the matrices of the backward.

        Raises:
            ValueError: If ``parameters`` has the wrong length.
        """

    def digest(self, addresses: list[int], sizes: list[int], threads: int) -> tuple[int, int]:
        """Return two 64-bit digests of ``sizes[i]`` bytes at each ``addresses[i]``, in order.

        They do not depend on the number of threads or the instruction set. A change of one 32-bit word
        changes both.

        Raises:
            ValueError: If the numbers of sizes and addresses differ, or if a size is negative.
        """

    def forward(
        self,
        batch: Batch,
        recursion: Recursion,
        packed: int,
        kept: int,
        workspace: int,
        y_out: int,
        z_out: int,
        threads: int,
    ) -> None:
        """Run the recursion: ``y_out`` [R, D], and ``z_out`` [R, D] if it has steps.

        ``kept`` receives the data that :meth:`backward` reads; 0 keeps nothing.
        """

    def backward(
        self,
        batch: Batch,
        recursion: Recursion,
        parameters: list[int],
        packed: int,
        kept: int,
        workspace: int,
        dy_out: int,
        dz_out: int,
        dx: int,
        dy: int,
        dz: int,
        gradients: list[int],
        output_norm_gradient: int,
        threads: int,
    ) -> None:
        """Compute the gradients of the inputs, and of the parameters in the order of :meth:`pack`.

        ``dz_out``, ``dx``, ``dz`` and ``output_norm_gradient`` may be 0.

        Raises:
            ValueError: If ``parameters`` or ``gradients`` does not have the length that :meth:`pack` expects.
        """

    def dropout_mask(
        self, recursion: Recursion, call_block: int, head: int, first_row: int, rows: int, mask: int
    ) -> None:
        """Write which attention weights [rows, rows] of one head of one call are kept: 1, or 0 if dropped."""
