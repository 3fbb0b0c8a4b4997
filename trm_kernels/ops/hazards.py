"""Detection of two patterns that Triton 3.6 to 3.9 pipelines incorrectly on sm_90, in a kernel's Triton IR.

1. An operand of a matrix product that is loaded in a loop and also read there in registers. Its ring buffer
   has one slot too few, so a copy in flight overwrites data that wgmma still reads.
2. A loop that loads through a pointer argument to which it also stores. It still gets a prefetch ring buffer
   and reads the data from before the store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_RESULT = re.compile(r"^\s*(%[\w#:, %]+?) = ([\w.]+)(.*)$")
_VALUE = re.compile(r"%[\w]+")
_LAYOUT_OPS = ("tt.trans", "ttg.convert_layout")


@dataclass
class _Op:
    name: str
    operands: list[str]
    loops: tuple[int, ...]  # the enclosing loops, outermost first


@dataclass
class _Code:
    """One kernel: the definition of each value, and the operands of each operation."""

    defined: dict[str, _Op] = field(default_factory=dict)
    operations: list[tuple[str | None, _Op]] = field(default_factory=list)
    carried: dict[str, str] = field(default_factory=dict)  # loop-carried variable -> initial value


def _parse(ttir: str) -> _Code:
    code = _Code()
    regions: list[int | None] = []  # the loop that each open brace belongs to
    count = 0
    for raw in ttir.splitlines():
        line = re.sub(r"\s*loc\([^)]*\)+", "", raw)
        loops = tuple(loop for loop in regions if loop is not None)
        found = _RESULT.match(line)
        result, name, rest = (found[1], found[2], found[3]) if found else (None, line.split("(")[0], line)
        loop = None
        if "scf.for" in line:
            count += 1
            loop = count
            for variable, start in re.findall(r"(%\w+) = (%\w+)", rest):
                code.carried[variable] = start
        if found is not None or line.lstrip().startswith(("tt.store", "scf.yield")):
            operation = _Op(name if found else line.split()[0], _VALUE.findall(rest), loops)
            code.operations.append((result, operation))
            if result is not None:
                code.defined[result.split(":")[0].strip()] = operation
        # Attributes open and close on one line, so an open brace starts a region.
        for _ in range(line.count("{") - line.count("}")):
            regions.append(loop)
        for _ in range(line.count("}") - line.count("{")):
            regions.pop()
    return code


def _loaded(code: _Code, value: str) -> str | None:
    """Return the load in a loop that produces ``value``, directly or transposed, or None."""
    while value in code.defined:
        operation = code.defined[value]
        if operation.name == "tt.load":
            return value if operation.loops else None
        if operation.name not in _LAYOUT_OPS:
            return None
        value = operation.operands[0]
    return None


def _base(code: _Code, value: str) -> str:
    """Return the argument from which a pointer is computed."""
    for _ in range(1000):
        if value in code.carried:
            value = code.carried[value]
        elif value in code.defined and code.defined[value].operands:
            value = code.defined[value].operands[0]
        else:
            break
    return value


def hazards(ttir: str) -> list[str]:
    """Return descriptions of the above patterns in a kernel's Triton IR."""
    code = _parse(ttir)
    found = []
    operands = {
        load
        for _, operation in code.operations
        if operation.name == "tt.dot"
        for value in operation.operands[:2]
        if (load := _loaded(code, value)) is not None
    }
    for load in sorted(operands):
        same = {load} | {
            result
            for result, operation in code.operations
            if result is not None and operation.name in _LAYOUT_OPS and operation.operands[0] == load
        }
        loop = code.defined[load].loops[-1]
        for _, operation in code.operations:
            reads = same & set(operation.operands)
            if loop in operation.loops and reads and operation.name not in ("tt.dot", *_LAYOUT_OPS):
                found.append(f"{load}, an operand of a product, is read again by {operation.name}")
    for _, store in code.operations:
        if store.name != "tt.store" or not store.loops:
            continue
        base = _base(code, store.operands[0])
        for result, load_op in code.operations:
            if load_op.name == "tt.load" and store.loops[-1] in load_op.loops:
                if _base(code, load_op.operands[0]) == base:
                    found.append(f"{result} is loaded through {base}, which the same loop stores to")
    return found
