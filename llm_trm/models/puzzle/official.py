"""Converts checkpoints of SamsungSAILMontreal/TinyRecursiveModels into a :class:`PuzzleTRM`, and back.

Source: ``models/recursive_reasoning/trm.py`` and ``pretrain.py`` there. A checkpoint is a state dict whose
keys have the prefix of the modules that wrap the model. It does not contain the number of heads, whether they
use RoPE, or the number of recursions: these come from the configuration next to it or from the caller.
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
from llm_trm.models.puzzle.official_config import check_exportable
from llm_trm.models.puzzle.official_file import (
    LAYERS,
    REMEDY,
    TOKENS,
    dtype_name,
    read_checkpoint,
    reject_unexpected,
    require_tensors,
)
from llm_trm.models.puzzle.official_sizes import TENSORS, SizeResolver
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig

#: Prefixes of torch.compile, the loss head and the halting wrapper.
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
#: Task, rows and columns of the official data sets, by vocabulary size and number of cells.
_KNOWN: dict[tuple[int, int], tuple[Task, int, int]] = {
    (11, 81): ("sudoku", 9, 9),
    (6, 900): ("maze", 30, 30),
    (12, 900): ("arc", 30, 30),
}
_NO_SUCH_MODEL = "PuzzleTRM does not support this, so the checkpoint cannot be imported"


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
    """Load an official checkpoint as a model in eval mode, and its metadata.

    Sizes come from the tensors if they determine them, otherwise from the caller, otherwise from
    ``all_config.yaml`` next to the file. The only default is the base of the rotary frequencies, 10,000.

    Args:
        path: A file written by ``torch.save(model.state_dict(), path)``, with any prefix or none. It may also
            contain the state dict within mappings, and an exponential moving average of it (``ema``), whose
            weights are then taken.
        positions: Position encoding. The tensors show whether positions are learned.
        heads: Number of attention heads; a token mixer has none.
        rope_theta: Base of the rotary frequencies.
        puzzle_len: Number of positions P before the cells.
        seq_len: Number of cells L of a puzzle. A token mixer and learned positions determine P + L.
        n_latent_steps, n_deep_recursions: n and T (``L_cycles`` and ``H_cycles``).
        max_steps: Number of supervision steps in training (``halt_max_steps``).
        dtype: Dtype of the residual stream; by default as in training (``forward_dtype``).
        task: Kind of puzzle. For the official data sets it follows from vocabulary and cells.
        grid: Rows and columns of a puzzle.
        backend: As for :class:`~trm_kernels.TinyRecursiveNetwork`.

    Returns:
        The model, and facts for :func:`~llm_trm.models.puzzle.paper.save_puzzle_model`: ``source``; ``task``,
        ``rows`` and ``columns`` if known; ``origins``, the origin of each size; ``official``, with which
        :func:`write_official` restores the prefix and dtypes; and ``averaged``, if the weights are an
        average.

    Raises:
        InputError: The checkpoint does not exist or has another architecture, or a size is unknown.
    """
    prefix, tensors, averaged = read_checkpoint(path)
    resolver = SizeResolver(path)
    inferred, length = _sizes_from_shapes(path, tensors)
    attention = inferred["mixer"] == "attention"
    if not attention and resolver.configured.get("positions") == "rope":
        resolver.configured["positions"] = "none"  # the official token mixer ignores its rotary tables

    sizes = {
        name: resolver.resolve(name, fixed=value) for name, value in inferred.items() if name != "positions"
    }
    sizes["positions"] = resolver.resolve(
        "positions", "--positions rope|none", positions, fixed=inferred.get("positions")
    )
    # A token mixer ignores the heads, but keep them for an export if they are known.
    if attention or heads or "n_heads" in resolver.configured:
        sizes["n_heads"] = resolver.resolve("n_heads", "--heads", heads)
    if sizes["positions"] == "rope":
        sizes["rope_theta"] = resolver.resolve("rope_theta", "--rope-theta", rope_theta, default=10000.0)
    options = _cells_by_option(path, sizes["vocab_size"], seq_len, task, grid)
    sizes.update(_lengths(resolver, sizes["puzzle_dim"], length, puzzle_len, options))
    sizes["n_latent_steps"] = resolver.resolve("n_latent_steps", "--latent-steps", n_latent_steps)
    sizes["n_deep_recursions"] = resolver.resolve("n_deep_recursions", "--deep-recursions", n_deep_recursions)
    sizes["max_steps"] = resolver.resolve("max_steps", "--max-steps", max_steps)
    sizes["dtype"] = _stream(resolver, tensors, dtype)
    resolver.finish()

    model = _build(path, sizes, tensors, backend)
    others = {
        name: dtype_name(tensor.dtype) for name, tensor in tensors.items() if tensor.dtype != torch.float32
    }
    facts = {
        **_puzzle_facts(path, model.config, resolver.configured, task, grid),
        "source": str(path),
        "origins": resolver.origins,
        "official": {"prefix": prefix, "dtypes": others},
        **({"averaged": True} if averaged else {}),
    }
    return model.eval(), facts


def write_official(model: PuzzleTRM, path: Path, facts: Mapping[str, Any] | None = None) -> list[str]:
    """Write ``model`` as an official checkpoint, atomically.

    As in official files, parameters are float32 and the initial states have the stream's dtype, unless
    ``facts`` record other dtypes. Tensors that would lose precision stay float32.

    Args:
        model: A model on any device.
        path: File to write.
        facts: Facts from :func:`read_official`.

    Returns:
        Names of the tensors that stay float32 because another dtype would lose precision.

    Raises:
        InputError: The official code does not support the model.
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
    """``tensor`` in its own storage, since torch.save writes whole storages."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _sizes_from_shapes(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], int | None]:
    """Fields of PuzzleTRMConfig, and the number of positions P + L if a tensor has it."""

    def shape(name: str) -> tuple[int, int]:
        if name not in tensors or tensors[name].dim() != 2:
            raise InputError(f"{path} has no matrix named {name}: {REMEDY}")
        return tensors[name].shape[0], tensors[name].shape[1]

    inferred: dict[str, Any] = {}
    inferred["vocab_size"], inferred["d_model"] = shape(TOKENS)
    inferred["num_puzzles"], inferred["puzzle_dim"] = shape(_PUZZLES) if _PUZZLES in tensors else (1, 0)
    inferred["n_layers"] = len({name.split(".")[2] for name in tensors if name.startswith(LAYERS)})
    mixer = f"{LAYERS}0.mlp_t.down_proj.weight"
    inferred["mixer"] = "tokens" if mixer in tensors else "attention"
    if mixer in tensors:
        if _POSITIONS in tensors:
            raise InputError(f"{path} has learned positions with a token mixer: {_NO_SUCH_MODEL}")
        return {**inferred, "positions": "none"}, shape(mixer)[0]
    if shape(f"{LAYERS}0.self_attn.qkv_proj.weight")[0] < 3 * inferred["d_model"]:
        raise InputError(f"{path} has grouped key/value heads: {_NO_SUCH_MODEL}")
    if _POSITIONS in tensors:
        return {**inferred, "positions": "learned"}, shape(_POSITIONS)[0]
    return inferred, None


def _cells_by_option(
    path: Path, vocab_size: int, seq_len: int | None, task: Task | None, grid: tuple[int, int] | None
) -> tuple[str, int | None]:
    """The caller's option that determines the number of cells of a puzzle, and that number."""
    if task in _VOCABULARIES and vocab_size != _VOCABULARIES[task]:
        raise InputError(
            f"{path} has {vocab_size} tokens, but --task {task} has {_VOCABULARIES[task]}: pass the "
            "checkpoint's task"
        )
    found = {}
    if seq_len is not None:
        found["--seq-len"] = seq_len
    if grid is not None:
        found["--grid"] = grid[0] * grid[1]
    if task == "sudoku":
        found["--task"] = (vocab_size - 2) ** 2  # padding, the blank, and one digit per row
    if task == "arc":
        found["--task"] = _ARC_CELLS  # all grids are padded to this size
    if len(set(found.values())) > 1:
        words = ", ".join(f"{option} {cells}" for option, cells in found.items())
        raise InputError(f"options contradict each other in the number of cells ({words}): omit one of them")
    return next(iter(found.items()), ("--grid ROWSxCOLUMNS", None))


def _lengths(
    resolver: SizeResolver,
    puzzle_dim: int,
    length: int | None,
    puzzle_len: int | None,
    cells: tuple[str, int | None],
) -> dict[str, int | None]:
    """P and L, of which ``length`` is the sum."""
    option, seq_len = cells
    # The official code cannot run puzzle positions without an embedding.
    front: int | None = None if puzzle_dim else 0
    if length is None:
        front = resolver.resolve("puzzle_len", "--puzzle-len", puzzle_len, fixed=front)
        return {"puzzle_len": front, "seq_len": resolver.resolve("seq_len", option, seq_len)}
    known = resolver.configured.get("seq_len") if seq_len is None else seq_len
    if front is None and known is not None:
        front = length - known
    if front is None and puzzle_len is None and "puzzle_len" not in resolver.configured:
        resolver.require_option(option)
        return {}
    front = resolver.resolve("puzzle_len", "--puzzle-len", puzzle_len, fixed=front)
    if not 0 <= front < length:
        raise InputError(
            f"{resolver.path} has {length} positions, too few for {known or front}: pass another --grid"
        )
    return {
        "puzzle_len": front,
        "seq_len": resolver.resolve("seq_len", option, seq_len, fixed=length - front),
    }


def _stream(resolver: SizeResolver, tensors: dict[str, Tensor], dtype: str | None) -> str:
    """The stream's dtype; by default the training's, which is the dtype of the initial states."""
    states = dtype_name(tensors["H_init"].dtype)
    found: str = resolver.resolve("dtype", "--dtype", dtype, default=states)
    if dtype is None and "dtype" not in resolver.configured:
        resolver.origins["dtype"] = TENSORS
    if found not in ("float32", "bfloat16"):
        raise InputError(
            f"{resolver.path} was trained in {one_line(found)}: choose --dtype float32 or bfloat16"
        )
    return found


def _build(path: Path, sizes: dict[str, Any], tensors: dict[str, Tensor], backend: str | None) -> PuzzleTRM:
    try:
        config = PuzzleTRMConfig(**sizes)
        # ARC's puzzle table takes gigabytes, so build the model without it and assign the loaded one. (The
        # meta device is no alternative: initialising there imports torch._refs, which takes 2 to 6 s.)
        model = PuzzleTRM(replace(config, num_puzzles=1), backend=backend)
    except ValueError as error:
        raise InputError(f"{path} and its options do not describe a PuzzleTRM: {one_line(error)}") from error
    model.config = config
    if config.puzzle_dim:
        model.puzzle_emb.weights = tensors[_PUZZLES].float()
    expected = {
        _official_name(name): (name, list(tensor.shape)) for name, tensor in model.state_dict().items()
    }
    require_tensors(path, [name for name in expected if name not in tensors])
    reject_unexpected(path, [name for name in tensors if name not in expected])
    for name, (_, shape) in expected.items():
        if list(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise InputError(
                f"{path} has {name} {found}, but its other tensors need {shape}: {_NO_SUCH_MODEL}"
            )
    state = {ours: tensors[name].float() for name, (ours, _) in expected.items()}
    model.load_state_dict(state, assign=True)
    return model


def _puzzle_facts(
    path: Path,
    config: PuzzleTRMConfig,
    configured: dict[str, Any],
    task: Task | None,
    grid: tuple[int, int] | None,
) -> dict[str, Any]:
    """Task, rows and columns, if known."""
    known = _KNOWN.get((config.vocab_size, config.seq_len))
    if grid is None and "rows" in configured and "columns" in configured:
        grid = configured["rows"], configured["columns"]
    if grid is None and task == "sudoku":
        grid = config.vocab_size - 2, config.vocab_size - 2
    if grid is None and known is not None and task in (None, known[0]):
        grid = known[1:]
    task = task or configured.get("task") or (known[0] if known is not None and grid == known[1:] else None)
    if grid is not None and grid[0] * grid[1] != config.seq_len:
        raise InputError(
            f"{path} has {config.seq_len} cells, not {grid[0]}x{grid[1]}: pass the checkpoint's --grid"
        )
    facts: dict[str, Any] = {} if task is None else {"task": task}
    if grid is not None:
        facts.update(rows=grid[0], columns=grid[1])
    return facts
