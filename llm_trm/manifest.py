"""A list of the files of a checkpoint with their checksums, which shows damage before it is loaded."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from llm_trm.checksums import file_digest, require_unchanged
from llm_trm.errors import InputError
from llm_trm.files import named_in, read_object, write_json

#: The list, in the folder whose files it names.
MANIFEST_FILE = "llm-trm-files.json"

#: Files that only a run that continues reads: our own, and those of a Hugging Face Trainer.
_STATE_FILES = (
    "state.safetensors",
    "state.json",
    "trainer_state.json",
    "training_args.bin",
    "rng_state*",
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
)
_KEY = "sha256"


def write_manifest(folder: Path) -> None:
    """List every file in ``folder`` and the folders in it; call it once all of them are written."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
    write_json(folder / MANIFEST_FILE, {_KEY: digests})


def require_whole(folder: Path, remedy: str) -> None:
    """Raise InputError, ending in ``remedy``, unless the listed files are there as they were written.

    A folder of an older version, which has no list, passes.
    """
    for path, digest in _listed(folder, remedy):
        if not path.is_file():
            raise InputError(f"{path} is missing: {remedy}")
        require_unchanged(path, digest, remedy)


def require_same_model(folder: Path, remedy: str) -> None:
    """As :func:`require_whole`, for the files of the model alone; one that was removed is not missed here."""
    for path, digest in _listed(folder, remedy):
        name = path.relative_to(folder).parts[0]
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in _STATE_FILES):
            require_unchanged(path, digest, f"{remedy}, or delete {folder / MANIFEST_FILE} if you changed it")


def _listed(folder: Path, remedy: str) -> list[tuple[Path, str]]:
    path = folder / MANIFEST_FILE
    if not path.exists():
        return []
    digests = read_object(path, remedy).get(_KEY)
    if not isinstance(digests, dict):
        raise InputError(f"{path} lists no checksums of files: {remedy}")
    return [(named_in(folder, name, path, remedy), digest) for name, digest in digests.items()]
