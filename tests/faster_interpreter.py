"""Triton's interpreter without its largest cost: it patches ``triton.language`` again on every call of a
device function inside a kernel, a third to a half of the time that these tests take. Once a launch will do.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Let a launch patch each set of language modules once; does nothing if Triton's internals have moved."""
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
        place = id(function.__globals__)
        if place not in modules:
            modules[place] = frozenset(
                id(value)
                for value in function.__globals__.values()
                if value is language or value is language.core
            )
        key = modules[place]
        if key in patched:
            return None  # a device function: its caller patched, and its caller's caller restores
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
