"""Tables of measured choices: which tile, and Triton or cuBLAS, for each GEMM on each GPU.

A table is a JSON file a GPU, written by ``llm-trm tune``. A user's own table goes before the packaged one,
entry by entry, and :func:`~trm_kernels.ops.tiles.heuristic` decides where neither has an entry.
``TRM_DISPATCH=heuristic`` ignores all tables; ``TRM_TABLES`` names the folder of the user's own (both are
read once, at import). A table that cannot be used is reported once and left out.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from trm_kernels import ops
from trm_kernels.ops.fingerprint import fingerprint
from trm_kernels.ops.tiles import Choice, Problem, Tile, flaw, heuristic

if TYPE_CHECKING:
    from trm_kernels.ops._launch import Target

FORMAT = 1
PACKAGED = Path(__file__).parent.parent / "tables"

Mode = Literal["tables", "heuristic"]


def _default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "trm_kernels" / "tables"


_MODE = os.environ.get("TRM_DISPATCH") or "tables"
_FOLDER = Path(os.environ.get("TRM_TABLES") or _default_folder())


class TableWarning(UserWarning):
    """A table, or an entry of one, is not used."""


class TableError(ValueError):
    """A file that is no table; the message names the file and what is wrong with it."""


def slug(device_name: str) -> str:
    """A device's name as a file name: NVIDIA H100 80GB HBM3 gives nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def user_path(device_name: str) -> Path:
    """Where a user's own table for a device lies."""
    return _FOLDER / f"{slug(device_name)}.json"


def packaged_path(device_name: str) -> Path:
    """Where the table that comes with the package lies, if there is one."""
    return PACKAGED / f"{slug(device_name)}.json"


def bucket(size: int) -> int:
    """The power of two nearest to ``size`` by ratio, at least 1."""
    return 1 << round(math.log2(max(size, 1)))


def key(problem: Problem) -> str:
    """What an entry is filed under: rows and batch in buckets, the sides of the weight exactly."""
    M, N, K, kind = problem.M, problem.N, problem.K, _kind(problem)
    if problem.kernel == "weight_gradient":
        return f"{kind} {M}x{N} rows {bucket(K)} batch {bucket(problem.batch)}"
    # Along the sequence, the rows are the channels: a size of the network, too.
    rows = M if problem.transposed else bucket(M)
    return f"{kind} {N}x{K} rows {rows} batch {bucket(problem.batch)}"


def _kind(problem: Problem) -> str:
    words = [problem.kernel, str(problem.operand).removeprefix("torch."), problem.activation.name.lower()]
    return " ".join(words + ["transposed"] * problem.transposed)


@dataclass(frozen=True)
class Entry:
    """One measured problem.

    Attributes:
        choice: The fastest of what was tried.
        ms: Its median time, in milliseconds.
        heuristic_ms: The median time of the heuristic's choice, measured in turn with it; None if that
            did not run.
        problem: The sizes that were measured, of all those in the bucket.
        source: :func:`~trm_kernels.ops.fingerprint.fingerprint` of the kernel that was measured.
        triton: Version of Triton that compiled it.
    """

    choice: Choice
    ms: float
    heuristic_ms: float | None
    problem: Problem
    source: str | None
    triton: str | None

    @property
    def stale(self) -> bool:
        """Whether the kernel has changed since; the choice is used until it is measured again."""
        return self.source != fingerprint(self.problem.kernel)

    def to_json(self) -> dict[str, Any]:
        """The entry as a table holds it."""
        tile = asdict(self.choice.tile)
        sizes = {name: getattr(self.problem, name) for name in ("M", "N", "K", "batch")}
        return {
            "route": self.choice.route,
            "tile": tile,
            "splits": self.choice.splits,
            "ms": self.ms,
            "heuristic_ms": self.heuristic_ms,
            "measured": sizes,
            "source": self.source,
            "triton": self.triton,
        }

    @staticmethod
    def from_json(name: str, value: Mapping[str, Any]) -> Entry:
        """Read an entry filed under ``name``; raises KeyError, TypeError or ValueError where it is none."""
        problem = _problem(name, value["measured"])
        tile = Tile(**{axis: _integer(size) for axis, size in value["tile"].items()})
        choice = Choice(value["route"], tile, _integer(value["splits"]))
        heuristic_ms = value["heuristic_ms"]
        return Entry(
            choice,
            float(value["ms"]),
            None if heuristic_ms is None else float(heuristic_ms),
            problem,
            value["source"],
            value["triton"],
        )


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no integer")
    return value


def _problem(name: str, sizes: Mapping[str, Any]) -> Problem:
    """The problem that an entry was measured on, checked against what it is filed under."""
    from trm_kernels.ops.tiles import Activation, Kernel

    kernel, dtype, activation = name.split()[:3]
    operand = getattr(torch, dtype, None)
    if kernel not in get_args(Kernel) or not isinstance(operand, torch.dtype):
        raise ValueError("it names no kernel and dtype")
    M, N, K, batch = (_integer(sizes[size]) for size in ("M", "N", "K", "batch"))
    transposed = name.split()[3] == "transposed"
    problem = Problem(kernel, M, N, K, batch, Activation[activation.upper()], operand, transposed)  # type: ignore[arg-type]
    if min(M, N, K, batch) < 1 or key(problem) != name:
        raise ValueError("the sizes that it was measured at are not those that it is filed under")
    return problem


@dataclass
class Table:
    """The entries of one device, and where they were measured.

    Attributes:
        device: ``name``, ``kind``, ``arch``, ``processors`` and ``shared_memory`` of the target.
        run: When and with what it was last written: ``time``, ``commit``, ``versions``.
        entries: By :func:`key`.
        flaws: What is wrong with entries that were left out.
    """

    device: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    flaws: list[str] = field(default_factory=list)

    @property
    def stale(self) -> int:
        """How many entries were measured with another version of their kernel."""
        return sum(entry.stale for entry in self.entries.values())

    def write(self, path: Path) -> None:
        """Replace the file at ``path``, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "device": self.device, "run": self.run}
        lines = [
            f"    {json.dumps(name)}: {json.dumps(entry.to_json())}"
            for name, entry in sorted(self.entries.items())
        ]
        text = json.dumps(header, indent=2)[:-2] + ',\n  "entries": {\n' + ",\n".join(lines) + "\n  }\n}\n"
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False
        ) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)


def read(path: Path, target: Target) -> Table:
    """Read a table for ``target``; entries that cannot run there are left out, and told in ``flaws``.

    Raises:
        TableError: The file is unreadable, no table of this format, or another device's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise TableError(f"{path} cannot be read: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise TableError(f"{path} is no table of format {FORMAT} (it says {found!r})")
    device, run, raw = content.get("device"), content.get("run"), content.get("entries")
    if not isinstance(device, dict) or not isinstance(run, dict) or not isinstance(raw, dict):
        raise TableError(f"{path} lacks its device, run or entries")
    if device.get("name") != target.name:
        raise TableError(f"{path} was measured on {device.get('name')!r}, this is {target.name!r}")
    table = Table(device, run)
    for name, value in raw.items():
        try:
            entry = Entry.from_json(name, value)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            table.flaws.append(f"{name!r}: {type(error).__name__}: {error}")
            continue
        reason = flaw(entry.problem, entry.choice, target)
        if reason is None:
            table.entries[name] = entry
        else:
            table.flaws.append(f"{name!r}: {reason}")
    return table


_REMEDY = "write it again with `llm-trm tune`, delete it, or set TRM_DISPATCH=heuristic"


def _usable(path: Path, target: Target) -> Table | None:
    """The table at ``path`` if there is one, with a warning for what is wrong with it."""
    if not path.is_file():
        return None
    try:
        table = read(path, target)
    except TableError as error:
        warnings.warn(f"{error}; it is not used: {_REMEDY}", TableWarning, stacklevel=2)
        return None
    if table.flaws:
        count, first = len(table.flaws), table.flaws[0]
        warnings.warn(
            f"{path}: {count} entries are not used ({first}): {_REMEDY}", TableWarning, stacklevel=2
        )
    return table


@functools.cache
def _tables(target: Target) -> tuple[Table, ...]:
    """The tables in use for a device, the user's own first."""
    found = (_usable(path(target.name), target) for path in (user_path, packaged_path))
    return tuple(table for table in found if table is not None)


def _heuristic_only() -> bool:
    if _MODE not in get_args(Mode):
        known = " or ".join(get_args(Mode))
        raise ValueError(f"TRM_DISPATCH: unknown mode {_MODE!r}: choose {known}")
    return _MODE == "heuristic"


def lookup(problem: Problem, target: Target) -> Choice | None:
    """The measured choice for a problem, or None where nobody measured one.

    Raises:
        ValueError: ``TRM_DISPATCH`` is neither ``tables`` nor ``heuristic``.
    """
    if _heuristic_only():
        return None
    name = key(problem)
    for table in _tables(target):
        entry = table.entries.get(name)
        if entry is not None:
            return entry.choice
    return None


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, target: Target) -> Choice:
    # A target without a name is compiled for and not run on: what is recorded depends on no table.
    if target.name and not target.interpreted:
        from trm_kernels.ops import dispatch

        measured = dispatch.lookup(problem, target)
        if measured is not None:
            return measured
    return heuristic(problem, target)


def forget_choices() -> None:
    """Ask again for every choice: the tables have changed."""
    _choose.cache_clear()


def choose(problem: Problem, target: Target) -> Choice:
    """How ``problem`` is computed on ``target``: as measured there, or by :func:`heuristic`."""
    return _choose(problem, target) if _override is None else _override(problem, target)


Chooser = Callable[[Problem, "Target"], Choice]
_override: Chooser | None = None


@contextmanager
def chosen_by(chooser: Chooser) -> Iterator[None]:
    """Let ``chooser`` make the choices, in the whole process: a tuner tries them in turn."""
    global _override
    before, _override = _override, chooser
    try:
        yield
    finally:
        _override = before


def refresh() -> None:
    """Read the environment and the tables again."""
    global _MODE, _FOLDER
    _MODE = os.environ.get("TRM_DISPATCH") or "tables"
    _FOLDER = Path(os.environ.get("TRM_TABLES") or _default_folder())
    _tables.cache_clear()
    forget_choices()


def describe() -> list[str]:
    """What decides tiles on each visible GPU, a line each, for ``llm-trm env``."""
    if _heuristic_only():
        return ["the heuristic alone (TRM_DISPATCH=heuristic)"]
    if torch.cuda.device_count() == 0:
        return [f"no GPU; tables of one's own would lie in {_FOLDER}"]
    if ops.MISSING is not None:
        return [f"none: {ops.MISSING}"]
    from trm_kernels.ops._launch import target_of

    targets = (target_of(torch.empty(0, device=f"cuda:{i}")) for i in range(torch.cuda.device_count()))
    return [describe_target(target) for target in dict.fromkeys(targets)]


def describe_target(target: Target) -> str:
    """The tables in use for one device, in a line."""
    paths = [path for path in (user_path(target.name), packaged_path(target.name)) if path.is_file()]
    if not paths:
        return f"{target.name}: the heuristic alone (no table; `llm-trm tune` measures one)"
    return f"{target.name}: {'; '.join(_describe_table(path, target) for path in paths)}; else the heuristic"


def _describe_table(path: Path, target: Target) -> str:
    try:
        table = read(path, target)
    except TableError as error:
        return f"{error}, not used"
    stale = f", {table.stale} of them with another version of their kernel" if table.stale else ""
    broken = f", {len(table.flaws)} broken ones left out" if table.flaws else ""
    return f"{path} ({len(table.entries)} entries of {table.run.get('time', 'unknown date')}{stale}{broken})"
