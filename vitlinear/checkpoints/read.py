"""The reader of checkpoint files and pickles: whatever wrote them, nothing in them is run.

Training scripts save more than weights: settings, paths, logs, numbers of numpy. Those values are
read into plain ones, by name, so that neither their classes nor their packages are needed. No other
file of the package unpickles anything.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from vitlinear.errors import UserError, one_line


class CheckpointError(UserError, ValueError):
    """A file of weights that cannot be used; the message is one line and names the file."""


class _NumpyType:
    """Stands for a ``numpy.dtype``: a name such as ``f8``, and the order of its bytes."""

    def __init__(self, name: str, *args: Any) -> None:
        self.name, self.order = str(name), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _NumpyArray:
    """Stands for a ``numpy.ndarray``; `numpy.asarray` makes one of it, if it is of numbers."""

    def __init__(self, *args: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        if kind.name in _NUMBERS and isinstance(data, bytes):
            flat = np.frombuffer(data, np.dtype(kind.order + kind.name))
            self.array = flat.reshape(shape, order="F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype)


class LossHistory:
    """Stands for a ``HistoryBuffer`` of mmengine: the values of a loss, and how many each counts.

    Attributes:
        values: [N], of numbers.
        counts: [N], of numbers.
    """

    def __init__(self) -> None:
        self.values = self.counts = np.empty(0)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.values = np.asarray(state.get("_log_history", ()))
        self.counts = np.asarray(state.get("_count_history", ()))


class _Unread:
    """Stands for what is never weights, such as a method of the history of a loss."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Letters of the struct module for numbers of numpy.
_NUMBERS = {
    "f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
}  # fmt: skip


def _numpy_scalar(kind: _NumpyType, data: object = None) -> object:
    """The Python number that a numpy scalar holds; None for other scalars."""
    letter = _NUMBERS.get(kind.name)
    if letter is None or not isinstance(data, bytes):
        return None
    return struct.unpack(kind.order + letter, data)[0]


# What may stand beside weights: values without code, and what each is read into.
_SETTINGS: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    (_NumpyType, "numpy.dtype"),
    (_NumpyArray, "numpy.ndarray"),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_NumpyArray, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    # Of mmengine's message hub. Each history names methods of its class, through `getattr`, which
    # is not called: `_Unread` takes its place.
    (LossHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Unread, "builtins.getattr"),
    # Python 3.13 has moved them.
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PurePosixPath, f"{module}.PurePosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}")


def read_checkpoint(path: str | Path, mmap: bool = True) -> Mapping[str, Any]:
    """Everything in a checkpoint file, without running code from it.

    Raises:
        CheckpointError: As `read_saved`, which has the arguments too; or it is not a checkpoint.
    """
    checkpoint = read_saved(path, mmap)
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not weights")
    return checkpoint


def read_saved(path: str | Path, mmap: bool = True) -> Any:
    """Everything in a file, without running code from it.

    Args:
        path: A safetensors file, by its name, or one that ``torch.save`` wrote.
        mmap: Bring tensors into memory where they are used, and not at once. Tensors that outlive
            the file, or a change of it, must be brought at once.

    Raises:
        CheckpointError: It is missing, damaged, or would run code.
    """
    path = Path(path)
    _check_is_file(path)
    if path.suffix == ".pt2":
        raise CheckpointError(
            f"checkpoint {path} is a program of torch.export, not a checkpoint: give the file that "
            "it was made from"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Files since PyTorch 1.6 are archives, which can be read where they lie: of a training
        # checkpoint only the weights are then brought into memory.
        with torch.serialization.safe_globals(_SETTINGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that it may not know
            mmap = mmap and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if names := _forbidden(str(error)):
            raise CheckpointError(
                f"checkpoint {path} needs code that it names to be run ({names}); that is refused, "
                "for such a file can do anything: save its tensors alone, with a program you trust"
            ) from error
        raise _damaged(path, error) from error
    except (
        safetensors.SafetensorError, OSError, RuntimeError, EOFError, LookupError, ValueError,
        TypeError, AttributeError, ImportError, struct.error, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise _damaged(path, error) from error


# What pickles of plain data name; protocols up to 2 have the names of Python 2.
_PLAIN = {
    "builtins": {"set", "frozenset", "slice", "complex", "bytearray"},
    "__builtin__": {"set", "frozenset", "slice", "complex", "bytearray"},
    "collections": {"OrderedDict"},
    "_codecs": {"encode"},  # of bytes
    "numpy": {"ndarray", "dtype"},
    **{f"numpy.{core}.multiarray": {"_reconstruct", "scalar"} for core in ("core", "_core")},
    **{f"numpy.{core}.numeric": {"_frombuffer"} for core in ("core", "_core")},
}


class _Values(pickle.Unpickler):
    """An unpickler of containers, strings, numbers and arrays of numpy."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of that name, if nothing can be done with it."""
        if name not in _PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_pickle(file: IO[bytes], name: str, **kwargs: Any) -> Any:
    """The value in a pickle of plain data, without running code from it.

    Args:
        file: Open for reading.
        name: What it is called in messages.
        **kwargs: ``encoding`` and ``errors``, for pickles of Python 2.

    Raises:
        CheckpointError: It is damaged, or would run code.
    """
    try:
        return _Values(file, **kwargs).load()
    except pickle.UnpicklingError as error:
        if re.fullmatch(r"[\w.]+\.\w+", str(error)):
            raise CheckpointError(
                f"{name} needs code that it names to be run ({error}); that is refused, for such "
                "a file can do anything: save its values alone, with a program you trust"
            ) from error
        raise CheckpointError(f"{name} is damaged, or is no pickle: {one_line(error)}") from error
    except (
        EOFError, LookupError, ValueError, TypeError, AttributeError, ImportError, OverflowError,
        struct.error,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{name} is damaged, or is no pickle: {one_line(error)}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; nothing for other files.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    path = Path(path)
    _check_is_file(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    # PyTorch's advice around the reason is to read the file unsafely.
    _, _, reason = one_line(error).rpartition("WeightsUnpickler error: ")
    reason = reason.partition(" Check the documentation")[0][:200]
    if not re.search("[A-Za-z]", reason):  # a key that was not found, in text taken for a pickle
        reason = f"{type(error).__name__}: {reason}"
    return CheckpointError(
        f"checkpoint {path} is truncated, corrupt or not a weights file ({reason}); "
        "use another copy"
    )


def _forbidden(message: str) -> str:
    """The callable that a refused pickle asked for, by PyTorch's message; empty if it broke."""
    found = re.findall(
        r"GLOBAL (\S+)"
        r"|allowlisted via `add_safe_globals`,? but got (?:<class ')?([\w.]+)"
        r"|unrecognized function (.+?)\s",
        message.rpartition("WeightsUnpickler error:")[2],
    )
    return ", ".join(dict.fromkeys("".join(names) for names in found))
