"""Converts checkpoints of SamsungSAILMontreal/TinyRecursiveModels into a :class:`PuzzleTRM`, and back.

Source: ``models/recursive_reasoning/trm.py`` and ``pretrain.py`` there. A checkpoint is a state dict under
the prefix of the wrappers around the model. It does not say how many heads there are, whether they rotate, or
how often the network is applied: that comes from the configuration beside it or from the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm_trm.choices import Positions, Task
from llm_trm.errors import InputError, one_line
from llm_trm.files import replacing
from llm_trm.models.puzzle.official_choice import TENSORS, Choice
from llm_trm.models.puzzle.official_config import check_exportable
from llm_trm.models.puzzle.official_file import (
    LAYERS,
    REMEDY,
    TOKENS,
    dtype_name,
    read_checkpoint,
    refuse_missing,
    refuse_unexpected,
)
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig

#: Of torch.compile, of the loss head and of the halting wrapper.
PREFIX = "_orig_mod.model.inner."

_POSITIONS, _PUZZLES = "embed_pos.embedding_weight", "puzzle_emb.weights"
_STATES = ("H_init", "L_init")
_OFFICIAL_NAMES = {
    "y_init": "H_init",
    "z_init": "L_init",
    "embed_tokens.weight": TOKENS,
    "embed_pos": _POSITIONS,
}

_ARC_CELLS = 900
_VOCABULARIES: dict[str, int] = {"maze": 6, "arc": 12}
#: Task, rows and columns of the official data sets, by vocabulary and cells.
_KNOWN: dict[tuple[int, int], tuple[Task, int, int]] = {
    (11, 81): ("sudoku", 9, 9),
    (6, 900): ("maze", 30, 30),
    (12, 900): ("arc", 30, 30),
}
_NO_SUCH_MODEL = "a PuzzleTRM has no such thing, and the checkpoint cannot be imported"


def read_official(
    path: Path,
    *,
    positions: Positions | None = None,
    heads: int | None = None,
    rope_theta: float | None = None,
    puzzle_len: int | None = None,
    seq_len: int | None = None,
    n_latent_steps: int | None = None,
    n_deep_recursions: int | None = None,
    max_steps: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    task: Task | None = None,
    grid: tuple[int, int] | None = None,
    backend: str | None = None,
) -> tuple[PuzzleTRM, dict[str, Any]]:
    """The model of an official checkpoint, in eval mode, and what is known of it.

    What the tensors tell is taken from them; the rest from the caller, else from ``all_config.yaml`` beside
    the file. Nothing is assumed but the base of the rotary frequencies: 10,000 unless another is named.

    Args:
        path: A file that ``torch.save(model.state_dict(), path)`` wrote, with any prefix or none.
        positions: Encoding of positions; tensors tell learned ones.
        heads: Attention heads; a token mixer has none.
        rope_theta: Base of the rotary frequencies.
        puzzle_len: Positions P in front of the cells.
        seq_len: Cells L of a puzzle. A token mixer and learned positions tell P + L.
        n_latent_steps, n_deep_recursions: n and T (``L_cycles`` and ``H_cycles``).
        max_steps: Supervision steps in training (``halt_max_steps``).
        dtype: Of the residual stream; by default that of the training (``forward_dtype``).
        task: Kind of puzzle; that of the official data sets is known by vocabulary and cells.
        grid: Rows and columns of a puzzle.
        backend: As for :class:`~trm_kernels.TinyRecursiveNetwork`.

    Returns:
        The model, and facts for :func:`~llm_trm.models.puzzle.paper.save_puzzle_model`: ``source``; ``task``,
        ``rows`` and ``columns`` as far as they are known; ``origins``, where each size came from;
        ``official``, with which :func:`write_official` writes the same prefix and dtypes again.

    Raises:
        InputError: No such checkpoint, one of another architecture, or a size that nothing tells.
    """
    prefix, tensors = read_checkpoint(path)
    choice = Choice(path)
    told, length = _told_by_shapes(path, tensors)
    attention = told["mixer"] == "attention"
    if not attention and choice.said.get("positions") == "rope":
        choice.said["positions"] = "none"  # the official token mixer leaves its rotary tables unused

    sizes = {name: choice.take(name, fixed=value) for name, value in told.items() if name != "positions"}
    sizes["positions"] = choice.take(
        "positions", "--positions rope|none", positions, fixed=told.get("positions")
    )
    # What a token mixer ignores is kept, for the sake of an export, where it is known.
    if attention or heads or "n_heads" in choice.said:
        sizes["n_heads"] = choice.take("n_heads", "--heads", heads)
    if sizes["positions"] == "rope":
        sizes["rope_theta"] = choice.take("rope_theta", "--rope-theta", rope_theta, default=10000.0)
    options = _cells_by_option(path, sizes["vocab_size"], seq_len, task, grid)
    sizes.update(_lengths(choice, sizes["puzzle_dim"], length, puzzle_len, options))
    sizes["n_latent_steps"] = choice.take("n_latent_steps", "--latent-steps", n_latent_steps)
    sizes["n_deep_recursions"] = choice.take("n_deep_recursions", "--deep-recursions", n_deep_recursions)
    sizes["max_steps"] = choice.take("max_steps", "--max-steps", max_steps)
    sizes["dtype"] = _stream(choice, tensors, dtype)
    choice.finish()

    model = _build(path, sizes, tensors, backend)
    others = {
        name: dtype_name(tensor.dtype) for name, tensor in tensors.items() if tensor.dtype != torch.float32
    }
    facts = {
        **_puzzle_facts(path, model.config, choice.said, task, grid),
        "source": str(path),
        "origins": choice.origins,
        "official": {"prefix": prefix, "dtypes": others},
    }
    return model.eval(), facts


def write_official(model: PuzzleTRM, path: Path, facts: Mapping[str, Any] | None = None) -> list[str]:
    """Write ``model`` as an official checkpoint, whole or not at all.

    Parameters are float32 and the initial states have the stream's dtype, as in official files, unless
    ``facts`` remember others; what would lose bits so is float32.

    Args:
        model: On any device.
        path: File to write.
        facts: Of :func:`read_official`.

    Returns:
        Names of the tensors that are float32 because another dtype would have cost bits.

    Raises:
        InputError: The official code has no such model.
    """
    config = model.config
    check_exportable(config)
    layout = (facts or {}).get("official", {})
    dtypes = layout.get("dtypes", dict.fromkeys(_STATES, config.dtype))
    content, kept = {}, []
    for ours, tensor in model.state_dict().items():
        name = _official_name(ours)
        wanted = tensor.to(getattr(torch, dtypes.get(name, "float32")))
        if not torch.equal(wanted.to(tensor.dtype), tensor):
            kept.append(name)
            wanted = tensor
        content[layout.get("prefix", PREFIX) + name] = _alone(wanted.cpu())
    with replacing(path) as temporary:
        torch.save(content, temporary)
    return kept


def _official_name(ours: str) -> str:
    if ours.startswith("net.layers."):
        return LAYERS + ours.removeprefix("net.layers.")
    return _OFFICIAL_NAMES.get(ours, ours)


def _alone(tensor: Tensor) -> Tensor:
    """``tensor`` in a storage of its own: torch.save writes whole storages."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _told_by_shapes(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], int | None]:
    """Fields of PuzzleTRMConfig, and the number of positions P + L if a tensor has it."""

    def shape(name: str) -> tuple[int, int]:
        if name not in tensors or tensors[name].dim() != 2:
            raise InputError(f"{path} has no matrix {name}: {REMEDY}")
        return tensors[name].shape[0], tensors[name].shape[1]

    told: dict[str, Any] = {}
    told["vocab_size"], told["d_model"] = shape(TOKENS)
    told["num_puzzles"], told["puzzle_dim"] = shape(_PUZZLES) if _PUZZLES in tensors else (1, 0)
    told["n_layers"] = len({name.split(".")[2] for name in tensors if name.startswith(LAYERS)})
    mixer = f"{LAYERS}0.mlp_t.down_proj.weight"
    told["mixer"] = "tokens" if mixer in tensors else "attention"
    if mixer in tensors:
        if _POSITIONS in tensors:
            raise InputError(f"{path} has learned positions beside a token mixer: {_NO_SUCH_MODEL}")
        return {**told, "positions": "none"}, shape(mixer)[0]
    if shape(f"{LAYERS}0.self_attn.qkv_proj.weight")[0] < 3 * told["d_model"]:
        raise InputError(f"{path} has grouped key/value heads: {_NO_SUCH_MODEL}")
    if _POSITIONS in tensors:
        return {**told, "positions": "learned"}, shape(_POSITIONS)[0]
    return told, None


def _cells_by_option(
    path: Path, vocab_size: int, seq_len: int | None, task: Task | None, grid: tuple[int, int] | None
) -> tuple[str, int | None]:
    """How many cells a puzzle has by the caller's word, and the option that says so."""
    if task in _VOCABULARIES and vocab_size != _VOCABULARIES[task]:
        raise InputError(
            f"{path} has {vocab_size} tokens, and --task {task} {_VOCABULARIES[task]}: give its own task"
        )
    found = {}
    if seq_len is not None:
        found["--seq-len"] = seq_len
    if grid is not None:
        found["--grid"] = grid[0] * grid[1]
    if task == "sudoku":
        found["--task"] = (vocab_size - 2) ** 2  # padding, the blank, and as many digits as rows
    if task == "arc":
        found["--task"] = _ARC_CELLS  # all grids are padded to these
    if len(set(found.values())) > 1:
        words = ", ".join(f"{option} {cells}" for option, cells in found.items())
        raise InputError(f"options contradict each other in the number of cells ({words}): leave one out")
    return next(iter(found.items()), ("--grid ROWSxCOLUMNS", None))


def _lengths(
    choice: Choice, puzzle_dim: int, length: int | None, puzzle_len: int | None, cells: tuple[str, int | None]
) -> dict[str, int | None]:
    """P and L, of which ``length`` is the sum."""
    option, seq_len = cells
    # The official code cannot run positions in front without an embedding in them.
    front: int | None = None if puzzle_dim else 0
    if length is None:
        front = choice.take("puzzle_len", "--puzzle-len", puzzle_len, fixed=front)
        return {"puzzle_len": front, "seq_len": choice.take("seq_len", option, seq_len)}
    known = choice.said.get("seq_len") if seq_len is None else seq_len
    if front is None and known is not None:
        front = length - known
    if front is None and puzzle_len is None and "puzzle_len" not in choice.said:
        choice.lack(option)
        return {}
    front = choice.take("puzzle_len", "--puzzle-len", puzzle_len, fixed=front)
    if not 0 <= front < length:
        raise InputError(
            f"{choice.path} has {length} positions, which {known or front} do not fit: give another --grid"
        )
    return {"puzzle_len": front, "seq_len": choice.take("seq_len", option, seq_len, fixed=length - front)}


def _stream(choice: Choice, tensors: dict[str, Tensor], dtype: str | None) -> str:
    """The stream's dtype; the initial states have that of the training, but others are allowed."""
    states = dtype_name(tensors["H_init"].dtype)
    found: str = choice.take("dtype", "--dtype", dtype, default=states)
    if dtype is None and "dtype" not in choice.said:
        choice.origins["dtype"] = TENSORS
    if found not in ("float32", "bfloat16"):
        raise InputError(f"{choice.path} was trained in {found}: choose --dtype float32 or bfloat16")
    return found


def _build(path: Path, sizes: dict[str, Any], tensors: dict[str, Tensor], backend: str | None) -> PuzzleTRM:
    try:
        config = PuzzleTRMConfig(**sizes)
        # ARC's table of puzzles has gigabytes: no other is made, and this one is taken over as it is. (On the
        # meta device, initialising imports torch._refs, for 2 to 6 s.)
        model = PuzzleTRM(replace(config, num_puzzles=1), backend=backend)
    except ValueError as error:
        raise InputError(f"{path} and its options describe no PuzzleTRM: {one_line(error)}") from error
    model.config = config
    if config.puzzle_dim:
        model.puzzle_emb.weights = tensors[_PUZZLES].float()
    expected = {
        _official_name(name): (name, list(tensor.shape)) for name, tensor in model.state_dict().items()
    }
    refuse_missing(path, [name for name in expected if name not in tensors])
    refuse_unexpected(path, [name for name in tensors if name not in expected])
    for name, (_, shape) in expected.items():
        if list(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise InputError(
                f"{path} has {name} {found}, not {shape} as its other tensors want: {_NO_SUCH_MODEL}"
            )
    state = {ours: tensors[name].float() for name, (ours, _) in expected.items()}
    model.load_state_dict(state, assign=True)
    return model


def _puzzle_facts(
    path: Path,
    config: PuzzleTRMConfig,
    said: dict[str, Any],
    task: Task | None,
    grid: tuple[int, int] | None,
) -> dict[str, Any]:
    """Task, rows and columns, as far as they are known."""
    known = _KNOWN.get((config.vocab_size, config.seq_len))
    if grid is None and "rows" in said and "columns" in said:
        grid = said["rows"], said["columns"]
    if grid is None and task == "sudoku":
        grid = config.vocab_size - 2, config.vocab_size - 2
    if grid is None and known is not None and task in (None, known[0]):
        grid = known[1:]
    task = task or said.get("task") or (known[0] if known is not None and grid == known[1:] else None)
    if grid is not None and grid[0] * grid[1] != config.seq_len:
        raise InputError(
            f"{path} is for {config.seq_len} cells, not for {grid[0]}x{grid[1]}: give its --grid"
        )
    facts: dict[str, Any] = {} if task is None else {"task": task}
    if grid is not None:
        facts.update(rows=grid[0], columns=grid[1])
    return facts
