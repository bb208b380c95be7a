"""Triton's interpreter in a fraction of its time, with the same results.

By itself it looks through all members of Triton's modules at each launch and at each call of a
device function, hundreds of times in a launch, and finds them replaced already. It makes the type
of each intermediate result anew, its name and the types of its sizes included, which takes longer
than to compute the result. And of each sum of integers it computes whether it overflows, which it
tells nobody unless it debugs.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_patch, _numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
_init_block_type, _type_of_tuple = core.block_type.__init__, core._type_for_tuple_values
_patched: set[str] = set()  # names of the modules
_numpy_types: dict[str, np.dtype] = {}  # by the name of the type of an entry
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}  # attributes, by that name and the sizes
_tuple_types: dict[tuple[int, ...], Any] = {}


class _Nothing:
    def restore(self) -> None:
        """Leave the modules as they are: every kernel of the process is interpreted."""


@functools.cache
def _modules(fn: Callable[..., Any]) -> frozenset[str]:
    """Triton's modules that a function sees."""
    seen = (value for value in fn.__globals__.values() if inspect.ismodule(value))
    return frozenset(module.__name__ for module in seen if module in (tl, core))


def _patch_once(fn: Callable[..., Any]) -> Any:
    if not _modules(fn) <= _patched:
        _patched.update(_modules(fn))
        _patch(fn)
    return _Nothing()


def _known_numpy_type(type_: Any) -> np.dtype:
    name = type_.scalar.name
    found = _numpy_types.get(name)
    if found is None:
        found = _numpy_types[name] = _numpy_type(type_)
    return found


def _known_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = [size.value if isinstance(size, core.constexpr) else size for size in shape]
    key = (element_ty.name, *sizes)
    found = _block_types.get(key)
    if found is None:
        _init_block_type(self, element_ty, sizes)
        _block_types[key] = dict(self.__dict__)
    else:
        self.__dict__.update(found)


def _known_type_of_tuple(values: Any, fields: Any = None) -> Any:
    if fields is not None or any(type(value) is not int for value in values):
        return _type_of_tuple(values, fields)
    key = tuple(values)
    found = _tuple_types.get(key)
    if found is None:
        found = _tuple_types[key] = _type_of_tuple(values)
    return found


@functools.cache
def _shape(*sizes: int) -> tuple[Any, Any]:
    """The shape of a tensor, and the number of its entries."""
    return core.tuple([core.constexpr(n) for n in sizes]), core.constexpr(math.prod(sizes))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(*type.shape) if type.is_block() else _shape()


interpreter._patch_lang = _patch_once
interpreter._get_np_dtype = _known_numpy_type
core.block_type.__init__ = _known_block_type
core.tensor.__init__ = _init_tensor
core._type_for_tuple_values = _known_type_of_tuple
assert not interpreter.interpreter_builder.options.debug, "sums that overflow would be told"
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
