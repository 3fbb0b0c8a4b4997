"""The C++ kernels for CPUs (csrc/). Tensors are passed as addresses of float32 data, 0 for none.

Nothing here checks or keeps alive what an address leads to. R rows are the valid positions of all samples,
one behind the other; D is the width. Sizes are in floats. Importing it needs torch imported before: it uses
torch's OpenMP.
"""

def instruction_sets() -> list[str]:
    """The instruction sets that both this build and this machine have, best first."""

def default_instruction_set() -> str:
    """The instruction set of a :class:`Network` that names none: the best, or TRM_NATIVE_ISA's.

    Raises:
        ValueError: TRM_NATIVE_ISA names one that is not here.
    """

def fma_peak(seconds: float, threads: int, name: str | None = None) -> float:
    """GF/s of independent multiply-adds in registers, on each of ``threads`` threads at once, once warm.

    Raises:
        ValueError: Instruction set ``name`` is not here, or ``threads`` is less than 1.
    """

def tile_rate(seconds: float, threads: int, name: str | None = None) -> float:
    """GF/s of the micro-kernel on data in the first-level cache, likewise.

    It takes twice the instructions of :func:`fma_peak` for as many multiply-adds, so that it tells when
    another thread runs on the same core.
    """

class Batch:
    """``samples`` stretches of rows: sample s goes from row ``starts[s]`` to ``starts[s + 1]``.

    Args:
        rows: R.
        starts: int32 [samples + 1].
        cos: RoPE table [longest, head size / 2] by position; 0 without RoPE. ``sin`` likewise.
        positions: int32 [R], of each row in its sample; 0: its place there.
    """

    def __init__(self, rows: int, samples: int, starts: int, cos: int, sin: int, positions: int) -> None: ...

class Recursion:
    """``steps`` times z = net(x + y + z), then y = net(y + z).

    Args:
        x: [R, D]; 0 if ``steps`` is 0.
        y: [R, D].
        z: [R, D]; 0 if ``steps`` is 0 and y alone goes in.
        output_norm: Weight [D] of a norm behind every call of the network, or 0.
        output_eps: Of that norm; negative: there is none.
        dropout: Probability of dropping an attention weight, in [0, 1).
        seed: In [0, 2**64).
        recompute: Keep the inputs of calls alone, and run each call again in the backward.
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
    """A network's shape, and the kernels that run it; immutable, safe to use from several threads at once.

    Args:
        width: D.
        inner: Inner width of the MLP.
        pre_norm: h + f(norm(h)), or norm(h + f(h)).
        gated: SwiGLU, or GELU.
        rotary: Rotary positions, NeoX layout.
        eps: Of every norm of a block.
        length: Of the samples, where an MLP over positions takes the place of attention; 0: attention.
        token_inner: Inner width of that MLP: SwiGLU if post-norm, GELU with biases if pre-norm.
        instruction_set: One of :func:`instruction_sets`; None: :func:`default_instruction_set`.

    Raises:
        ValueError: The instruction set is not here, or the sizes do not fit one another.
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
        """Floats in a register."""

    def packed_size(self, backward: bool) -> int: ...
    def kept_size(self, batch: Batch, recursion: Recursion) -> int: ...
    def workspace_size(self, batch: Batch, recursion: Recursion, backward: bool, threads: int) -> int: ...
    def pack(self, parameters: list[int], backward: bool, packed: int, threads: int) -> None:
        """Write the weights to ``packed`` as the kernels read them.

        Args:
            parameters: For each block norm1 [D], qkv [3 D, D], qkv_bias, out [D, D], out_bias, norm2 [D],
                up [F or 2 F, D], up_bias, down [D, F], down_bias; 0 where the network has none. A token
                mixer's MLP takes the places of qkv and out.
            backward: Write what the backward reads too.

        Raises:
            ValueError: ``parameters`` has another length.
        """

    def digest(self, addresses: list[int], sizes: list[int], threads: int) -> tuple[int, int]:
        """Two 64-bit digests of memory: ``sizes[i]`` bytes at each ``addresses[i]``, in this order.

        The same for any number of threads and any instruction set. A change of one 32-bit word changes both.

        Raises:
            ValueError: There are more or fewer sizes than addresses, or one is negative.
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

        ``kept`` takes what :meth:`backward` will read; 0: nothing is kept.
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
        """Gradients of the inputs, and of the parameters in the order of :meth:`pack`.

        ``dz_out``, ``dx``, ``dz`` and ``output_norm_gradient`` may be 0.

        Raises:
            ValueError: ``parameters`` or ``gradients`` has another length than :meth:`pack` takes.
        """

    def dropout_mask(
        self, recursion: Recursion, call_block: int, head: int, first_row: int, rows: int, mask: int
    ) -> None:
        """Which attention weights [rows, rows] of one head of one call are kept: 1, or 0 where dropped."""
