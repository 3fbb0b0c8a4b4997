"""Errors that the user or the machine causes, as one line with the remedy; any other is a fault of ours."""

from __future__ import annotations

import errno
import re
import sys

from llm_trm.errors import InputError, one_line, system_error

#: Longest message: a path or a value that a file repeats a million times must not fill the screen.
_LONGEST = 1500
_UNKNOWN = "check the path and the disk"
_PLACE = "choose a path that you can write to"
_SPACE = "free some space, or choose a path on another disk"
#: Remedies by the error number of an OSError.
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit (ulimit -f), or choose a path on another disk",
    errno.EROFS: _PLACE,
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file",
    errno.EIO: "check the disk",
    errno.ENOMEM: "use smaller batches or a smaller model",
}
_MEMORY = "memory ran out: use smaller batches or a smaller model"
#: How trm_kernels, which knows no InputError, begins its errors about environment variables.
_VARIABLE = re.compile(r"TRM_[A-Z_]+: ")
#: How torch, and Path.resolve before Python 3.13, which have no classes for these errors, word them.
_WORDINGS = {
    re.compile(r"^Symlink loop from "): "a symbolic link leads back to itself: choose another path",
    re.compile(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs"): (
        f"a file could not be written completely: {_SPACE}"
    ),
    re.compile(r"can't allocate memory|not enough memory"): _MEMORY,
}


def expected(error: BaseException) -> str | None:
    """The line for an error with a cause outside this program; None for any other error."""
    if isinstance(error, InputError):
        message = str(error)
    elif isinstance(error, OSError):
        message = _system(error)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        message = _MEMORY
    elif isinstance(error, RecursionError):
        message = "the input nests too deeply: simplify it"
    elif isinstance(error, UnicodeError):
        message = f"text cannot be read or written ({error}): use UTF-8"
    elif isinstance(error, EOFError):
        message = f"the input ends too early ({str(error) or 'no more data'}): check its files"
    elif isinstance(error, ValueError) and _VARIABLE.match(str(error)):
        message = str(error)
    elif _is_loaded(error, "trm_kernels.backends.choice", "BackendError"):
        message = f"{error}: choose another backend with TRM_BACKEND, or none for the fastest that works"
    elif (number := system_error(error)) is not None:
        remedy = _REMEDIES.get(number, _UNKNOWN)
        message = f"a file cannot be read or written ({error}): {remedy}"
    elif _is_loaded(error, "safetensors", "SafetensorError"):
        message = f"weights cannot be read or written ({error}): check the file and the space on its disk"
    else:
        return next((line for wording, line in _WORDINGS.items() if wording.search(str(error))), None)
    return shortened_middle(one_line(message, None))


def shortened_middle(line: str) -> str:
    """``line`` without its middle if it is very long: the start names the fault, and the end the remedy."""
    if len(line) <= _LONGEST:
        return line
    half = _LONGEST // 2
    return f"{line[:half]} [...] {line[-half:]}"


def _system(error: OSError) -> str:
    """The line for an error of the operating system, or of a library that derives its errors from OSError."""
    if error.errno is None:
        return str(error) or type(error).__name__
    files = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    remedy = _REMEDIES.get(error.errno, _UNKNOWN)
    return f"{files or 'a file or standard output'}: {error.strerror}: {remedy}"


def _is_loaded(error: BaseException, module: str, name: str) -> bool:
    # Not imported: a command that has not loaded the module cannot have raised its error.
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(error, getattr(loaded, name))
