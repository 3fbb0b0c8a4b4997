"""A patch for the largest cost of Triton's interpreter: it patches ``triton.language`` in every call of a
device function inside a kernel, which takes a third to a half of the time of these tests. Once per launch is
enough.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Patch each set of language modules once per launch; does nothing if Triton's internals have changed."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    language = interpreter.tl
    patched: set[frozenset[int]] = set()
    modules: dict[int, frozenset[int]] = {}

    def patch_once(function: Any) -> Any:
        namespace = id(function.__globals__)
        if namespace not in modules:
            modules[namespace] = frozenset(
                id(value)
                for value in function.__globals__.values()
                if value is language or value is language.core
            )
        key = modules[namespace]
        if key in patched:
            return None  # a device function: the kernel has patched and will restore
        scope = patch(function)
        if not patched and hasattr(scope, "restore"):
            restore = scope.restore

            def restore_and_forget() -> None:
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        patched.add(key)
        return scope

    interpreter._patch_lang = patch_once
