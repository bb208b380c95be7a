"""Triton's interpreter in half its time: it puts its functions into Triton's modules once a launch.

By itself it looks through all their members again at each call of a device function, hundreds of
times in a launch, and finds them replaced already.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_patched: set[str] = set()  # names of the modules, in the launch that runs


class _Nothing:
    def restore(self) -> None:
        """The launch restores what it replaced."""


@functools.cache
def _modules(fn: Callable[..., Any]) -> frozenset[str]:
    """Triton's modules that a function sees."""
    seen = (value for value in fn.__globals__.values() if inspect.ismodule(value))
    return frozenset(module.__name__ for module in seen if module in (tl, tl.core))


def _patch_once(fn: Callable[..., Any]) -> Any:
    if _modules(fn) <= _patched:
        return _Nothing()
    _patched.update(_modules(fn))
    return _patch(fn)


def _launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
    _patched.clear()
    try:
        _launch(self, *args, **kwargs)
    finally:
        _patched.clear()


interpreter._patch_lang = _patch_once
interpreter.GridExecutor.__call__ = _launch_anew
