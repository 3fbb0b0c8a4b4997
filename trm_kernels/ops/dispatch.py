"""Tables of measured choices: the tile, and Triton or cuBLAS, for each GEMM on each GPU.

``llm-trm tune`` writes one table, a JSON file, per GPU. Entries of the user's table take precedence over
those of the packaged one; without an entry in either, :func:`~trm_kernels.ops.tiles.heuristic` decides.
``TRM_DISPATCH=heuristic`` ignores all tables; ``TRM_TABLES`` sets the folder of the user's tables (both are
read once, at import). An unusable table triggers one warning and is ignored.
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
from contextlib import contextmanager, suppress
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
#: Longest time that an entry may have, in milliseconds: a day. No float holds every larger integer.
_LONGEST_MS = 86_400_000
PACKAGED = Path(__file__).parent.parent / "tables"

Mode = Literal["tables", "heuristic"]


def _default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "trm_kernels" / "tables"


_MODE = os.environ.get("TRM_DISPATCH") or "tables"
_FOLDER = Path(os.environ.get("TRM_TABLES") or _default_folder())


class TableWarning(UserWarning):
    """A table, or an entry in one, is ignored."""


class TableError(ValueError):
    """A file is not a valid table; the message contains the file and the reason."""


def slug(device_name: str) -> str:
    """Convert a device name to a file name: NVIDIA H100 80GB HBM3 becomes nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def user_path(device_name: str) -> Path:
    """Return the path of the user's table for a device."""
    return _FOLDER / f"{slug(device_name)}.json"


def packaged_path(device_name: str) -> Path:
    """Return the path of the packaged table for a device, which may not exist."""
    return PACKAGED / f"{slug(device_name)}.json"


def bucket(size: int) -> int:
    """Return the power of two nearest to ``size`` by ratio, at least 1."""
    return 1 << round(math.log2(max(size, 1)))


def key(problem: Problem) -> str:
    """Return the key of an entry: rows and batch are bucketed, the sizes of the weight are exact."""
    M, N, K, kind = problem.M, problem.N, problem.K, _kind(problem)
    if problem.kernel == "weight_gradient":
        return f"{kind} {M}x{N} rows {bucket(K)} batch {bucket(problem.batch)}"
    # If transposed, rows are channels, which are a fixed size of the network too.
    rows = M if problem.transposed else bucket(M)
    return f"{kind} {N}x{K} rows {rows} batch {bucket(problem.batch)}"


def _kind(problem: Problem) -> str:
    words = [problem.kernel, str(problem.operand).removeprefix("torch."), problem.activation.name.lower()]
    return " ".join(words + ["transposed"] * problem.transposed)


@dataclass(frozen=True)
class Entry:
    """One measured problem.

    Attributes:
        choice: The fastest choice that was measured.
        ms: Its median time in milliseconds.
        heuristic_ms: Median time of the heuristic's choice, measured alternately with it; None if that did
            not run.
        problem: The measured problem, one of those in the bucket.
        source: :func:`~trm_kernels.ops.fingerprint.fingerprint` of the measured kernel.
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
        """Whether the kernel has changed since the measurement; the choice is still used."""
        return self.source != fingerprint(self.problem.kernel)

    def to_json(self) -> dict[str, Any]:
        """Return the entry in the format of a table."""
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
        """Read the entry with key ``name``; raises KeyError, TypeError or ValueError if it is invalid."""
        problem = _problem(name, value["measured"])
        tile = Tile(**{axis: _integer(size) for axis, size in value["tile"].items()})
        choice = Choice(value["route"], tile, _integer(value["splits"]))
        heuristic_ms = value["heuristic_ms"]
        return Entry(
            choice,
            _milliseconds(value["ms"]),
            None if heuristic_ms is None else _milliseconds(heuristic_ms),
            problem,
            value["source"],
            value["triton"],
        )


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def _milliseconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= _LONGEST_MS:
        raise ValueError(f"{value!r:.40} is not a time in milliseconds")
    return float(value)


def _problem(name: str, sizes: Mapping[str, Any]) -> Problem:
    """Return the measured problem of an entry, after checking it against the entry's key."""
    from trm_kernels.ops.tiles import Activation, Kernel

    kernel, dtype, activation = name.split()[:3]
    operand = getattr(torch, dtype, None)
    if kernel not in get_args(Kernel) or not isinstance(operand, torch.dtype):
        raise ValueError("unknown kernel or dtype")
    M, N, K, batch = (_integer(sizes[size]) for size in ("M", "N", "K", "batch"))
    transposed = name.split()[3] == "transposed"
    problem = Problem(kernel, M, N, K, batch, Activation[activation.upper()], operand, transposed)  # type: ignore[arg-type]
    if min(M, N, K, batch) < 1 or key(problem) != name:
        raise ValueError("the measured sizes do not match the key")
    return problem


@dataclass
class Table:
    """The entries of one device, and the circumstances of their measurement.

    Attributes:
        device: ``name``, ``kind``, ``arch``, ``processors`` and ``shared_memory`` of the target.
        run: Time and software of the last write: ``time``, ``commit``, ``versions``.
        entries: Entries by :func:`key`.
        flaws: Reasons why entries were ignored.
    """

    device: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    flaws: list[str] = field(default_factory=list)

    @property
    def stale(self) -> int:
        """Number of entries that were measured with another version of their kernel."""
        return sum(entry.stale for entry in self.entries.values())

    def write(self, path: Path) -> None:
        """Replace the file at ``path`` atomically."""
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
            try:
                file.write(text)
                file.close()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:  # a full disk, or Ctrl-C
                with suppress(OSError):
                    file.close()  # writes what is buffered, again
                os.unlink(file.name)
                raise


def read(path: Path, target: Target) -> Table:
    """Read a table for ``target``. Entries that cannot run there are ignored and listed in ``flaws``.

    Raises:
        TableError: If the file is unreadable, not a table in this format, or for another device.
    """
    if path.exists() and not path.is_file():
        raise TableError(f"{path} is no regular file")  # /dev/zero has no end
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise TableError(f"{path} cannot be read: {error}") from error
    except RecursionError:
        raise TableError(f"{path} cannot be read: it nests too deeply") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise TableError(f"{path} is not a table of format {FORMAT} (its format is {found!r:.100})")
    device, run, raw = content.get("device"), content.get("run"), content.get("entries")
    if not isinstance(device, dict) or not isinstance(run, dict) or not isinstance(raw, dict):
        raise TableError(f"{path} has no device, run or entries")
    if device.get("name") != target.name:
        raise TableError(f"{path} was measured on {device.get('name')!r:.100}, but this is {target.name!r}")
    table = Table(device, run)
    for name, value in raw.items():
        try:
            entry = Entry.from_json(name, value)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            table.flaws.append(f"{name!r:.100}: {type(error).__name__}: {error!s:.200}")
            continue
        reason = flaw(entry.problem, entry.choice, target)
        if reason is None:
            table.entries[name] = entry
        else:
            table.flaws.append(f"{name!r:.100}: {reason!s:.200}")
    return table


_REMEDY = "recreate it with `llm-trm tune`, delete it, or set TRM_DISPATCH=heuristic"


def _usable(path: Path, target: Target) -> Table | None:
    """Return the table at ``path`` if it exists and is valid, and warn of anything invalid."""
    if not path.is_file():
        return None
    try:
        table = read(path, target)
    except TableError as error:
        warnings.warn(f"{error}; it is ignored: {_REMEDY}", TableWarning, stacklevel=2)
        return None
    if table.flaws:
        count, first = len(table.flaws), table.flaws[0]
        warnings.warn(f"{path}: {count} entries are ignored ({first}): {_REMEDY}", TableWarning, stacklevel=2)
    return table


@functools.cache
def _tables(target: Target) -> tuple[Table, ...]:
    """Return the tables in use for a device, the user's first."""
    found = (_usable(path(target.name), target) for path in (user_path, packaged_path))
    return tuple(table for table in found if table is not None)


def _heuristic_only() -> bool:
    if _MODE not in get_args(Mode):
        known = " or ".join(get_args(Mode))
        raise ValueError(f"TRM_DISPATCH: unknown mode {_MODE[:40]!r}: choose {known}")
    return _MODE == "heuristic"


def lookup(problem: Problem, target: Target) -> Choice | None:
    """Return the measured choice for a problem, or None if there is none.

    Raises:
        ValueError: If ``TRM_DISPATCH`` is neither ``tables`` nor ``heuristic``.
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
    # A target without a name is compile-only, so that recordings do not depend on tables.
    if target.name and not target.interpreted:
        from trm_kernels.ops import dispatch

        measured = dispatch.lookup(problem, target)
        if measured is not None:
            return measured
    return heuristic(problem, target)


def forget_choices() -> None:
    """Clear the cache of choices after the tables have changed."""
    _choose.cache_clear()


def choose(problem: Problem, target: Target) -> Choice:
    """Return the choice for ``problem`` on ``target``: the measured one, or that of :func:`heuristic`."""
    return _choose(problem, target) if _override is None else _override(problem, target)


Chooser = Callable[[Problem, "Target"], Choice]
_override: Chooser | None = None


@contextmanager
def chosen_by(chooser: Chooser) -> Iterator[None]:
    """Let ``chooser`` make all choices in this process, so that a tuner can try them in turn."""
    global _override
    before, _override = _override, chooser
    try:
        yield
    finally:
        _override = before


def refresh() -> None:
    """Reload the environment variables and the tables."""
    global _MODE, _FOLDER
    _MODE = os.environ.get("TRM_DISPATCH") or "tables"
    _FOLDER = Path(os.environ.get("TRM_TABLES") or _default_folder())
    _tables.cache_clear()
    forget_choices()


def describe() -> list[str]:
    """Describe the source of tile choices on each visible GPU, one line each, for ``llm-trm env``."""
    if _heuristic_only():
        return ["only the heuristic (TRM_DISPATCH=heuristic)"]
    if torch.cuda.device_count() == 0:
        return [f"no GPU; folder for your own tables: {_FOLDER}"]
    if ops.MISSING is not None:
        return [f"none: {ops.MISSING}"]
    from trm_kernels.ops._launch import target_of

    targets = (target_of(torch.empty(0, device=f"cuda:{i}")) for i in range(torch.cuda.device_count()))
    return [describe_target(target) for target in dict.fromkeys(targets)]


def describe_target(target: Target) -> str:
    """Describe the tables in use for one device in one line."""
    paths = [path for path in (user_path(target.name), packaged_path(target.name)) if path.is_file()]
    if not paths:
        return f"{target.name}: only the heuristic (no table; `llm-trm tune` creates one)"
    return f"{target.name}: {'; '.join(_describe_table(path, target) for path in paths)}; else the heuristic"


def _describe_table(path: Path, target: Target) -> str:
    try:
        table = read(path, target)
    except TableError as error:
        return f"{error}, ignored"
    stale = f", {table.stale} of them with another version of their kernel" if table.stale else ""
    broken = f", {len(table.flaws)} invalid ones ignored" if table.flaws else ""
    return (
        f"{path} ({len(table.entries)} entries from {table.run.get('time', 'unknown date')}{stale}{broken})"
    )
