"""Atomic file writes, and reads whose errors name the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from llm_trm.errors import InputError, one_line
from llm_trm.text import parse_json, read_text

#: Ending of the temporary folders of this package, by which those of a killed process are recognised.
_UNFINISHED = ".llm-trm-tmp"
#: Names of the streams that a process has open.
_STREAM = re.compile(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/(self|\d+)/fd/\d+")


@contextmanager
def unfinished(folder: Path, name: str) -> Iterator[Path]:
    """A temporary folder in ``folder`` for what will be called ``name``; removed at the end of the block.

    Libraries write temporary files of their own next to a file, and those end up in it as well.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=_UNFINISHED, dir=folder))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what :func:`unfinished` left in ``folder`` when its process was killed.

    Call it only where no other process writes; see :func:`llm_trm.claims.claimed`.
    """
    for path in folder.glob(f".*{_UNFINISHED}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends without an error.

    The content reaches the disk before the rename, so a crash leaves either the old file or the new one. A
    symbolic link stays, and the file that it names is replaced. What is no regular file, such as
    ``/dev/stdout`` or a pipe, is written directly. An error of the disk names ``path``.
    """
    if is_special(path):
        with naming(path):
            yield path
        return
    path = path.resolve()
    with naming(path), unfinished(path.parent, path.name) as folder:
        temporary = folder / path.name
        yield temporary
        publish(temporary, path)


def is_special(path: Path) -> bool:
    """Whether ``path`` is an open stream such as ``/dev/stdout``, or no regular file, such as a pipe.

    Ask before resolving it: the link of a pipe in ``/proc`` leads to a name that no folder has. A stream may
    be a file that the shell has opened; replacing that would not reach the stream.
    """
    return path.exists() and (not path.is_file() or _STREAM.fullmatch(str(path.absolute())) is not None)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name ``path`` in errors of the disk that name no file, as those of writing to an open file do."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def publish(temporary: Path, path: Path) -> None:
    """Flush a temporary file or folder to disk, then rename it to ``path``."""
    # tempfile creates folders that only the owner can read. Widen the mode to what the umask allows.
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod((0o777 if temporary.is_dir() else 0o666) & ~mask)
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: RawIOBase, content: bytes, path: Path) -> None:
    """Write ``content`` to an unbuffered file, of which a full disk may first take a part.

    Raises:
        OSError: The error names ``path``.
    """
    with naming(path):
        while content:
            content = content[file.write(content) or 0 :]


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write ``lines``, which include their line endings, atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file. Raises InputError, ending in ``remedy``, if it is missing or invalid."""
    try:
        return parse_json(read_text(path))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {remedy}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error, None)}): {remedy}") from error


def read_object(path: Path, remedy: str, *, optional: bool = False) -> dict[str, Any]:
    """Read a JSON file with an object. Raises InputError, ending in ``remedy``, if it contains none.

    Args:
        optional: Whether a missing file counts as an empty object.
    """
    if optional and not path.exists():
        return {}
    content = read_json(path, remedy)
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain a JSON object: {remedy}")
    return content


def named_in(folder: Path, name: Any, index: Path, remedy: str) -> Path:
    """Resolve ``name``, which the file ``index`` lists, to a file or folder below ``folder``.

    Symbolic links below ``folder`` may point anywhere: the hub's cache consists of links, and users link to
    data on other disks. An index file comes with data from elsewhere, so its names may not leave ``folder``.

    Raises:
        InputError: ``name`` is not a file name, is absolute, or leaves ``folder`` through ``..``.
    """
    known = isinstance(name, str) and "\0" not in name
    paths = (PurePosixPath(name), PureWindowsPath(name)) if known else ()
    if not all(path.parts and not path.anchor and ".." not in path.parts for path in paths) or not known:
        raise InputError(f"{index} names {name!r:.200}, which is not a file below {folder}: {remedy}")
    return folder / name


def require_new(path: Path, *, overwrite: bool, option: str = "--output") -> None:
    """Raise InputError if an output file exists, unless ``overwrite``.

    Args:
        option: The option that named ``path``. Special files such as ``/dev/null`` always pass.
    """
    if path.exists() and not is_special(path) and not overwrite:
        raise InputError(f"{path} already exists: replace it with --overwrite, or choose another {option}")


def require_writable(folder: Path) -> Path:
    """Return ``folder``, which need not exist; nothing is created.

    Raises:
        InputError: Files cannot be written in it, or it cannot be created.
    """
    existing = next(
        # Path.resolve raises RuntimeError for a link to itself before Python 3.13.
        path
        for path in (folder, *Path(os.path.realpath(folder)).parents)
        if path.exists() or path.is_symlink()
    )
    if not existing.is_dir():
        raise InputError(f"{folder} cannot be written ({existing} is not a folder): choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written ({existing} is read-only): choose another folder")
    return folder


def writable_folder(path: Path) -> Path:
    """Create ``path`` if it is missing, and return it. Raises InputError if it is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    return path
