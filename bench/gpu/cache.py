"""Triton's cache on disk: counts its hits, and packs it for a machine that has never compiled.

A cache contains absolute paths, and its keys depend on the source, Triton's own files and
``TRITON_DEFAULT_FP_FUSION``. An archive therefore records its folder and versions.
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

#: Folder of packed caches on both machines.
FOLDER = Path("/tmp/trm-triton-cache")
_MANIFEST = "manifest.json"


@dataclass
class Seen:
    """Counts of Triton's cache.

    Attributes:
        hits: Number of cache hits by kernel name, at most one per process and kernel.
        compiled: Number of compilations by kernel name.
    """

    hits: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)

    def take(self) -> tuple[int, dict[str, int]]:
        """Hits and compilations since the last call."""
        taken = self.hits.total(), dict(self.compiled)
        self.hits.clear()
        self.compiled.clear()
        return taken


def watch() -> Seen:
    """Start counting cache hits and compilations of this project's kernels."""
    seen = Seen()
    try:
        import triton
    except ImportError:  # the probe reports it
        return seen

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        # torch.compile creates kernels as well.
        if str(getattr(src.fn, "__module__", "")).startswith("trm_kernels"):
            (seen.hits if cache_hit else seen.compiled)[src.name] += 1

    triton.knobs.compilation.listener = listener
    return seen


def made_with() -> dict[str, str]:
    """Versions that must match for cache hits; ``key`` is a hash of Triton's own files."""
    from triton.runtime.cache import triton_key

    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "triton": importlib.metadata.version("triton"),
        "machine": platform.machine(),
        "key": hashlib.sha256(triton_key().encode()).hexdigest()[:12],
    }


def pack(folder: Path, archive: Path) -> int:
    """Write the cache in ``folder`` to ``archive`` (.tar.xz), and return its size in bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    manifest = json.dumps({"folder": str(folder), "made_with": made_with()}).encode()
    with tarfile.open(archive, "w:xz") as tar:
        about = tarfile.TarInfo(_MANIFEST)
        about.size = len(manifest)
        tar.addfile(about, io.BytesIO(manifest))
        tar.add(folder, "cache", filter=lambda info: None if info.name.endswith(".lock") else info)
    return archive.stat().st_size


def unpack(archive: Path) -> tuple[Path, list[str]]:
    """Unpack ``archive`` into its original folder. Returns the folder and this machine's version differences.

    Raises:
        ValueError: The file is not an archive of :func:`pack`.
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
        raise ValueError(f"{archive} is not a cache packed by bench.precompile ({error})") from error
    here = made_with()
    made = manifest["made_with"]
    return folder, [f"{name} {here[name]}, not {made[name]}" for name in here if here[name] != made.get(name)]
