"""Files of tensors: safetensors, and what ``torch.save`` wrote. Errors name the file, fault and remedy.

A file is a user's own as often as ours: a clone without Git LFS, half a download, a disk that was full.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trm.errors import InputError, one_line, system_error
from llm_trm.files import replacing

#: Begins the small file that Git leaves in place of one that Git LFS stores.
_POINTER = b"version https://git-lfs"
_ZIP, _INCOMPLETE = b"PK\3\4", "the file is incomplete or damaged"
#: In torch's messages about objects whose creation could run code.
_UNSAFE = ("Unsupported global", "Unsupported class", "unrecognized function", "Can only build", "GLOBAL")
#: In safetensors' (before 0.5 too) and torch's messages about files that end too early.
_CUT = ("not fully covered", "MetadataIncompleteBuffer", "central directory")
#: Ends the message about every faulty file whose source is unknown.
RESTORE = "copy or download it again"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. Raises OSError, which names the file, if the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            if (number := system_error(error)) is None:
                raise
            raise OSError(number, os.strerror(number), str(path)) from error


def read_tensors(path: Path, remedy: str, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        InputError: The file is missing, incomplete, a Git LFS pointer or no safetensors file, or a tensor
            contains NaN or infinity. The message ends in ``remedy``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    require_present(path, remedy)
    try:
        tensors = load_file(path, device)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({_fault(error)}): {remedy}") from error
    require_finite(tensors.items(), str(path), remedy)
    return tensors


def read_shapes(path: Path, remedy: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, of which only the header is read.

    Raises:
        InputError: As for :func:`read_tensors`, except for the values of the tensors. Half a file is found,
            because its header does not fit its size.
    """
    from safetensors import SafetensorError, safe_open

    require_present(path, remedy)
    try:
        with safe_open(path, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({_fault(error)}): {remedy}") from error


def read_torch(path: Path, remedy: str, *, mapped: bool = False) -> Any:
    """Read a file that ``torch.save`` wrote, onto the CPU, without running code that it contains.

    Call it in ``torch.serialization.safe_globals`` to allow types other than torch's and Python's.

    Args:
        path: The file.
        remedy: End of the error message.
        mapped: Map the tensors into memory instead of reading them. This takes milliseconds whatever the
            size, if only the structure of the file is of interest.

    Raises:
        InputError: The file is missing, incomplete, a Git LFS pointer or not from ``torch.save``, or contains
            objects whose creation could run code.
    """
    require_present(path, remedy)
    zipped = zipfile.is_zipfile(path)
    if not zipped and _starts_with(path, _ZIP):
        raise InputError(f"{path} cannot be read ({_INCOMPLETE}): {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            # Older files, which are pickles, cannot be mapped.
            return torch.load(path, "cpu", weights_only=True, mmap=mapped and zipped)
    except pickle.UnpicklingError as error:
        # torch's own message is a page long and explains how to load the file in spite of the danger.
        if any(sign in str(error) for sign in _UNSAFE):
            raise InputError(
                f"{path} contains objects other than tensors, which could run code: {remedy}"
            ) from None
        raise InputError(f"{path} cannot be read (torch.save did not write it): {remedy}") from None
    # The unpickler follows whatever the bytes say, so that any exception can result.
    except Exception as error:
        raise InputError(f"{path} cannot be read ({_fault(error)}): {remedy}") from error


def require_present(path: Path, remedy: str) -> None:
    """Raise InputError if a file is missing, a folder, empty, or a Git LFS pointer."""
    try:
        require_no_pointer(path)
        empty = not path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {remedy}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
    if empty:
        raise InputError(f"{path} cannot be read (the file is empty): {remedy}")


def require_no_pointer(path: Path) -> None:
    """Raise InputError if a file is a Git LFS pointer, and OSError if it cannot be read."""
    if _starts_with(path, _POINTER):
        raise InputError(
            f"{path} is a Git LFS pointer, which stands for the file: run `git lfs pull` in its repository"
        )


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def require_size(path: Path, parameters: int, tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Raise InputError unless ``tensors`` have ``parameters`` elements, as the sizes in ``path`` imply.

    Call it before building a model from sizes in a file: sizes that do not match the weights may describe a
    model that does not fit into memory.
    """
    found = sum(tensor.numel() for tensor in tensors.values())
    if found != parameters:
        raise InputError(
            f"{path} describes a model of {parameters:,} parameters, but its weights have {found:,}: {remedy}"
        )


@torch.no_grad()
def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str, remedy: str) -> None:
    """Raise InputError if a tensor contains NaN or infinity.

    Args:
        tensors: Names and tensors of any dtype, shape and device.
        where: What contains them, the start of the message.
        remedy: End of the message.
    """
    for name, tensor in tensors:
        if not tensor.numel() or tensor.is_meta or not tensor.is_floating_point():
            continue
        if tensor.element_size() == 1:  # fp8 has no aminmax; bfloat16 represents all its values
            tensor = tensor.bfloat16()
        # One pass without copies, 0.09 s per GB on one core; isfinite().all() takes 3 s.
        least, most = torch.aminmax(tensor)
        if not torch.isfinite(least) or not torch.isfinite(most):
            raise InputError(f"{where} contains NaN or infinity in {name}: {remedy}")


def _fault(error: Exception) -> str:
    """The reason why a file cannot be read, in a user's words where they are known."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = one_line(error, 120)
    if isinstance(error, EOFError) or any(sign in text for sign in _CUT):
        return _INCOMPLETE
    if "header" in text.lower():
        return "it is not a safetensors file, or incomplete"
    return text or type(error).__name__
