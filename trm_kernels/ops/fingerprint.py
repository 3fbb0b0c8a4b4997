"""Fingerprints of kernel sources, which show whether a measurement used the installed kernel."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

_OPS = Path(__file__).parent

#: Module and function of the kernel for each kind of problem.
KERNELS = {
    "gemm": ("gemm", "gemm_kernel"),
    "stream": ("gemm", "gemm_kernel"),
    "norm_gradient": ("gemm", "gemm_kernel"),
    "activation_gradient": ("activation_gradient", "activation_gradient_kernel"),
    "weight_gradient": ("weight_gradient", "weight_gradient_kernel"),
}


@functools.cache
def fingerprint(kernel: str) -> str | None:
    """Return 12 hex digits that identify the code of a kernel and its jitted callees, or None without source.

    Comments, docstrings, formatting and launchers do not affect it.
    """
    module, function = KERNELS[kernel]
    try:
        found = _functions(module, function, {})
    except (OSError, KeyError, SyntaxError):
        return None
    text = "\n".join(found[name] for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _module(name: str) -> tuple[dict[str, ast.FunctionDef], dict[str, str]]:
    """Return the jitted functions of a module in ``ops``, and the modules of its other names from ``ops``."""
    functions: dict[str, ast.FunctionDef] = {}
    imported: dict[str, str] = {}
    for node in ast.parse((_OPS / f"{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            functions[node.name] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trm_kernels.ops."):
            imported |= {alias.name: str(node.module).rpartition(".")[2] for alias in node.names}
    return functions, imported


def _functions(module: str, name: str, found: dict[str, str]) -> dict[str, str]:
    """Add the code of ``name`` and of everything it calls to ``found``."""
    functions, imported = _module(module)
    node = functions[name]
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    found[f"{module}.{name}"] = ast.unparse(node)
    for used in {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)}:
        if used in functions and f"{module}.{used}" not in found:
            _functions(module, used, found)
        elif used in imported and used in _module(imported[used])[0]:
            _functions(imported[used], used, found)
    return found
