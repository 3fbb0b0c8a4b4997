"""Files that are written whole or not at all, and read with errors that name them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from llm_trm.errors import InputError, one_line
from llm_trm.text import parse_json, read_text

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the block ends without an error.

    The content reaches the disk before the name does, so that a crash leaves the old file or the new one.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a temporary file, or a folder, its name ``path`` once it has reached the disk."""
    # tempfile makes what only its owner can read; this is as public as the umask allows.
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


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write ``lines``, which bring their line ends, one after the other, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file; InputError, ending in ``remedy``, if it is missing or broken."""
    try:
        return parse_json(read_text(path))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {remedy}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error, None)}): {remedy}") from error


def named_in(folder: Path, name: Any, index: Path, remedy: str) -> Path:
    """What ``index`` calls ``name``, a file or a folder below ``folder``.

    A link there may lead anywhere: the hub's cache is made of links, and whoever keeps data on another disk
    makes one. An index, which comes with data from elsewhere, may not.

    Raises:
        InputError: It is no name, an absolute one, or one that leads out of ``folder`` by ``..``.
    """
    known = isinstance(name, str) and "\0" not in name
    paths = (PurePosixPath(name), PureWindowsPath(name)) if known else ()
    if not all(path.parts and not path.anchor and ".." not in path.parts for path in paths) or not known:
        raise InputError(f"{index} names {name!r:.200}, which is no file below {folder}: {remedy}")
    return folder / name


def read_tensors(path: Path, remedy: str, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file; InputError, ending in ``remedy``, if it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {remedy}") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error, None)}): {remedy}") from error


def require_size(path: Path, numbers: int, tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Raise InputError unless ``tensors`` have as many ``numbers`` as the sizes that ``path`` describes.

    Before a model is built of sizes that a file describes: what no weights belong to may fit no memory.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    if held != numbers:
        raise InputError(
            f"{path} describes a model of {numbers:,} numbers, and its weights have {held:,}: {remedy}"
        )


def writable_folder(path: Path) -> Path:
    """``path``, created where it is missing; InputError if nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    return path
