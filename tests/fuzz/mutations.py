"""Damages a file: its bytes, its fields if it is JSON, its tensors if it is safetensors."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 3298531\n"
)
#: In place of a field; the strings are JSON that json.dumps cannot write.
_FIELDS: tuple[Any, ...] = (
    *(None, True, False, "", "x", "nan", [], {}, [None], {"x": 1}, [[1]], 0, 1, -1, 2, 0.5, 1e308, -0.0),
    *(2**31, 2**63, 10**400, "\0", "../x", "/etc/passwd", "x" * 50_000, float("nan"), float("inf")),
)
_RAW = ("9" * 5000, "1e400", '"\\ud800"', "[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000)
_HEADER = 8  # bytes of the length of a safetensors header


def mutate(path: Path, chance: random.Random) -> str:
    """Damage the file ``path``; returns how, in words."""
    kinds: list[Callable[[Path, random.Random], str]] = [_bytes, _bytes, _whole]
    if path.suffix in (".json", ".jsonl"):
        kinds += [_json] * 5
    elif path.suffix == ".safetensors":
        kinds += [_tensors] * 3
    elif path.suffix in (".csv", ".txt", ".toml", ".yaml", ".jinja"):
        kinds += [_text] * 3
    return f"{path.name}: {chance.choice(kinds)(path, chance)}"


def _whole(path: Path, chance: random.Random) -> str:
    path, what = (
        path,
        chance.choice(("deleted", "a folder", "empty", "a pointer of Git LFS", "a loop", "noise")),
    )
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a loop":
        path.symlink_to(path.name)
    elif what == "noise":
        path.write_bytes(chance.randbytes(300))
    elif what != "deleted":
        path.write_bytes(b"" if what == "empty" else _POINTER)
    return what


def _bytes(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    what = chance.choice(("cut", "flipped", "flipped", "NUL", "inserted", "twice"))
    # Damage near the beginning hits headers.
    at = chance.randrange(len(content) if chance.random() < 0.5 else min(len(content), 400))
    if what == "cut":
        del content[at:]
    elif what == "flipped":
        for place in {at, *(chance.randrange(len(content)) for _ in range(chance.randrange(3)))}:
            content[place] ^= 1 << chance.randrange(8)
    elif what == "NUL":
        content[at : at + chance.randint(1, 64)] = bytes(chance.randint(1, 64))
    elif what == "inserted":
        content[at:at] = chance.choice(
            (b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\0", b"\xed\xa0\x80", b'"', b"{")
        )
    else:
        content += bytes(content)
    path.write_bytes(content)
    return f"{what} at byte {at}"


def _json(path: Path, chance: random.Random) -> str:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = chance.randrange(len(lines))
    value = json.loads(lines[at])
    places = list(_places(value))
    place = chance.choice(places)
    shown = "".join(f"[{key!r}]" for key in place) or "all of it"
    if chance.random() < 0.1 and place:
        *outer, last = place
        del _at(value, outer)[last]
        lines[at], how = json.dumps(value), "deleted"
    elif chance.random() < 0.2:
        mark = "a mark that stands for it"
        lines[at] = json.dumps(_replaced(value, place, mark)).replace(f'"{mark}"', raw := chance.choice(_RAW))
        how = raw
    else:
        new = chance.choice(_FIELDS)
        lines[at], how = (
            json.dumps(_replaced(value, place, new)),
            "a huge number" if _huge(new) else repr(new),
        )
    path.write_text("\n".join(lines) + "\n")
    return f"line {at + 1}, {shown}: {how[:60]}"


def _huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 100


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*place, key))


def _at(value: Any, place: list[Any] | tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def _replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    value = copy.deepcopy(value)
    _at(value, place[:-1])[place[-1]] = new
    return value


def _tensors(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:_HEADER])
    header = json.loads(content[_HEADER : _HEADER + length])
    data = bytearray(content[_HEADER + length :])
    names = [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    begin, end = header[name]["data_offsets"]
    what = chance.choice(("NaN", "infinity", "renamed", "deleted", "another shape", "another dtype", "field"))
    if what in ("NaN", "infinity"):
        kind = {"F32": np.float32, "F64": np.float64, "BF16": np.uint16}.get(header[name]["dtype"])
        if kind is None or begin == end:
            return _bytes(path, chance)
        values = np.frombuffer(data, kind, offset=begin, count=(end - begin) // np.dtype(kind).itemsize)
        special = 0x7FC0 if kind is np.uint16 else np.nan if what == "NaN" else np.inf
        values[chance.randrange(len(values))] = special
    elif what == "renamed":
        header[f"{name}x"] = header.pop(name)
    elif what == "deleted":
        del header[name]
    elif what == "another shape":
        header[name]["shape"] = [*reversed(header[name]["shape"]), 1]
    elif what == "another dtype":
        same = {
            "F32": "I32",
            "F64": "I64",
            "I64": "F64",
            "I32": "F32",
            "U8": "I8",
            "BF16": "F16",
            "BOOL": "U8",
        }
        header[name]["dtype"] = same.get(header[name]["dtype"], "F32")
    else:
        place = chance.choice(list(_places(header))[1:])
        header = _replaced(header, place, chance.choice((None, -1, 2**62, "x", [], {}, [0, 2**62])))
        what = f"{place} in the header"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return f"{name}: {what}"


def _text(path: Path, chance: random.Random) -> str:
    lines = path.read_text().split("\n")
    at = chance.randrange(len(lines))
    new = chance.choice(
        ("", ",", '"', "nan", "x" * 200_000, "\0", "\ufeff", "1" * 16, ",".join("x" * 100), "é", "[" * 2000)
    )
    if chance.random() < 0.5:
        lines[at] = new
    else:
        cells = lines[at].replace("=", ",").replace(":", ",").split(",")
        lines[at] = lines[at].replace(chance.choice(cells), new, 1)
    path.write_text("\n".join(lines))
    return f"line {at + 1}: {new[:30]!r}"


def copy_of(source: Path, target: Path) -> None:
    """Copy a file or a folder."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
