"""A reader of checkpoint files: whatever wrote them, nothing in them is run.

Training scripts save more than weights: settings, paths, logs, numbers of numpy. Those values are
read into plain ones, by name, so that neither their classes nor their packages are needed.
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
from typing import Any

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


class _Unread:
    """Stands for what is never weights: a ``numpy.ndarray``, the history of a loss, ..."""

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
    (_Unread, "numpy.ndarray"),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_Unread, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    # Of mmengine's message hub. Each history names methods of its class, through `getattr`, which
    # is not called: `_Unread` takes its place.
    (_Unread, "mmengine.logging.history_buffer.HistoryBuffer"),
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


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Everything in a checkpoint file, without running code from it.

    Args:
        path: A safetensors file, by its name, or one that ``torch.save`` wrote.

    Raises:
        CheckpointError: It is missing, damaged, not a checkpoint, or would run code.
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
            checkpoint = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
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
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not weights")
    return checkpoint


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
