"""Maps between the steps of a model, [H, W, C], in memory or in files, read and written by rows.

Files are read and written, not mapped into memory: a full disk is then an error and no signal, and
no page of them counts as memory of the process.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlinear.errors import UserError

from .memory import amount


class RowMap:
    """A map in memory.

    Attributes:
        shape: Height, width and channels.
        dtype: Of the values.
        prefix: Tokens that stand before those of the map, [1, P, C]; None without.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.prefix: Tensor | None = None
        self._rows = self._make()

    def _make(self) -> Any:
        return torch.empty(self.shape, dtype=self.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as a map [1, stop - start, W, C], not to be written to."""
        return self._rows[None, start:stop]

    def write(self, start: int, rows: Tensor) -> None:
        """Put rows [1, n, W, C] in their place."""
        self._rows[start : start + rows.shape[1]] = rows[0]

    def whole(self) -> Tensor:
        """The map, [1, H, W, C]."""
        return self._rows[None]

    def delete(self) -> None:
        """Give the place back."""
        self._rows = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class FileMap(RowMap):
    """A map in a file."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        path: Path,
        keep: bool = False,
        owned: bool = True,
    ) -> None:
        """Make the file, of its full size, or open it.

        Args:
            shape: Height, width and channels.
            dtype: Of the values.
            path: The file.
            keep: It is there, and holds rows that were written earlier.
            owned: This process takes it away; False where another one does.

        Raises:
            UserError: There is no room for it, or it cannot be opened.
        """
        self.path = path
        self.keep = keep
        self.owned = owned
        super().__init__(shape, dtype)

    def _make(self) -> Any:
        try:
            file = open(self.path, "r+b" if self.keep else "w+b", buffering=0)  # noqa: SIM115
            if not self.keep:
                reserve(file, self.nbytes)
        except FileNotFoundError as error:
            raise self._gone("is not there") from error
        except OSError as error:
            raise self._refused(error) from error
        return file

    def _gone(self, how: str) -> UserError:
        if self.owned:
            advice = f"delete {self.path.parent}, and the call begins anew"
        else:
            advice = "all processes need to see the workdir"
        return UserError(f"{self.path} {how}: {advice}")

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"cannot keep a map of {amount(self.nbytes)} in {self.path}: "
            f"{error.strerror or error}; what was finished stays, and the same call goes on from "
            "there"
        )

    def _place(self, rows: int) -> int:
        return rows * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """See `RowMap`.

        Raises:
            UserError: The file is shorter than it should be, or cannot be read.
        """
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        view = memoryview(rows.view(torch.uint8).flatten().numpy().data)
        done, offset = 0, self._place(start)
        while done < len(view):
            try:
                count = os.preadv(self._rows.fileno(), [view[done : done + 2**30]], offset + done)
            except OSError as error:
                raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
            if not count:
                raise UserError(f"{self.path} ends before row {stop}: it was changed; delete it")
            done += count
        return rows[None]

    def write(self, start: int, rows: Tensor) -> None:
        """See `RowMap`.

        Raises:
            UserError: The disk is full, or the file cannot be written.
        """
        rows = rows[0].to("cpu", self.dtype).contiguous()
        try:
            write_at(self._rows, self._place(start), rows.view(torch.uint8).flatten().numpy())
        except OSError as error:
            raise self._refused(error) from error

    def whole(self) -> Tensor:
        """See `RowMap`; in the file, which has to stay.

        Raises:
            UserError: It did not stay, or was cut short.
        """
        count = math.prod(self.shape)
        try:
            values = torch.from_file(str(self.path), shared=False, size=count, dtype=self.dtype)
        except RuntimeError as error:
            if self.path.is_file() and self.path.stat().st_size >= self.nbytes:
                raise
            raise self._gone("was deleted or cut short while the call ran") from error
        return values.unflatten(0, (1, *self.shape))

    def delete(self) -> None:
        """See `RowMap`."""
        self._rows.close()
        if self.owned:
            self.path.unlink(missing_ok=True)


def reserve(file: Any, size: int) -> None:
    """Take the room on the disk for a file of so many bytes, where the system can.

    Raises:
        OSError: There is not as much.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def write_at(file: Any, offset: int, values: np.ndarray) -> None:
    """Write the bytes of an array, contiguous, to a place in a file.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    view, done = values.reshape(-1).view(np.uint8).data, 0
    while done < len(view):
        done += os.pwrite(file.fileno(), view[done : done + 2**30], offset + done)
