"""Triton's cache on disk: what launches find in it, and how it travels to a machine that has never compiled.

A cache names its files by their absolute paths, and its keys hold the source, Triton's own files and
``TRITON_DEFAULT_FP_FUSION``: so an archive says where it must lie, and what it was made with.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import platform
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Where caches that travel lie, here and there.
FOLDER = Path("/tmp/trm-triton-cache")
_MANIFEST = "manifest.json"


@dataclass
class Seen:
    """What went through Triton's launch path.

    Attributes:
        hits: How often a kernel was found in the cache, by its name; once a process and kernel.
        compiled: How often one had to be compiled.
    """

    hits: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)

    def take(self) -> tuple[int, dict[str, int]]:
        """Hits, and what was compiled, since the last call."""
        taken = self.hits.total(), dict(self.compiled)
        self.hits.clear()
        self.compiled.clear()
        return taken


def watch() -> Seen:
    """Count what this project's kernels find in Triton's cache, or have compiled, from now on."""
    seen = Seen()
    try:
        import triton
    except ImportError:  # the probe says so
        return seen

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        # torch.compile makes kernels, too.
        if str(getattr(src.fn, "__module__", "")).startswith("trm_kernels"):
            (seen.hits if cache_hit else seen.compiled)[src.name] += 1

    triton.knobs.compilation.listener = listener
    return seen


def made_with() -> dict[str, str]:
    """What must be the same on both sides for the cache to be hit: ``key`` is of Triton's own files."""
    from triton.runtime.cache import triton_key

    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "triton": importlib.metadata.version("triton"),
        "machine": platform.machine(),
        "key": hashlib.sha256(triton_key().encode()).hexdigest()[:12],
    }


def pack(folder: Path, archive: Path) -> int:
    """Write the cache in ``folder`` to ``archive`` (.tar.xz); returns its bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    manifest = json.dumps({"folder": str(folder), "made_with": made_with()}).encode()
    with tarfile.open(archive, "w:xz") as tar:
        about = tarfile.TarInfo(_MANIFEST)
        about.size = len(manifest)
        tar.addfile(about, io.BytesIO(manifest))
        tar.add(folder, "cache", filter=lambda info: None if info.name.endswith(".lock") else info)
    return archive.stat().st_size


def unpack(archive: Path) -> tuple[Path, list[str]]:
    """Put the cache of ``archive`` where it was made; returns that folder, and what differs on this machine.

    Raises:
        ValueError: It is no archive of :func:`pack`.
    """
    try:
        with tarfile.open(archive, "r:xz") as tar:
            about = tar.extractfile(_MANIFEST)
            assert about is not None
            manifest = json.loads(about.read())
            folder = Path(manifest["folder"])
            folder.mkdir(parents=True, exist_ok=True)
            for member in tar:
                if member.name.startswith("cache/"):
                    member.name = member.name.removeprefix("cache/")
                    tar.extract(member, folder, filter="data")
    except (OSError, tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{archive} is no cache that bench.precompile packed ({error})") from error
    here = made_with()
    made = manifest["made_with"]
    return folder, [f"{name} {here[name]}, not {made[name]}" for name in here if here[name] != made.get(name)]
