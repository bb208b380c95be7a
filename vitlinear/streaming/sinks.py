"""Places that maps are written to by rows, as they come: arrays, zarr, TIFF, GeoTIFF."""

from __future__ import annotations

import math
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlinear.errors import UserError, one_line
from vitlinear.files import check_parent

from .libraries import load_library
from .maps import reserve, write_at
from .sources import chunk_length, levels_of

TILE = 256  # rows and columns of tiles and chunks, as most readers have them
COPIES = 3  # of a block: as it is read, masked, and in the order of the file
KINDS = ".npy, .zarr, .tif or .tiff"


class Rows(Protocol):
    """A map whose rows can be read, as many as there are by now."""

    shape: tuple[int, int, int]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as [1, stop - start, W, C]."""


def check_sink(sink: Any, overwrite: bool) -> None:
    """Check a place before anything runs.

    Args:
        sink: A path, or an array.
        overwrite: Whether a file may be there.

    Raises:
        UserError: Its kind is not known, its folder is not there, or a library is missing.
    """
    if not isinstance(sink, (str, Path)):
        if not (hasattr(sink, "shape") and hasattr(sink, "__setitem__")):
            raise UserError(
                f"cannot write a map to {type(sink).__name__}: give an array [C, H, W], or the "
                f"path of a {KINDS} file"
            )
        return
    path = Path(sink).expanduser()
    kind = path.suffix.lower()
    if kind not in (".npy", ".zarr", ".tif", ".tiff"):
        raise UserError(f"cannot write {path}: maps are written as {KINDS}")
    check_parent(str(path))
    if path.exists() and not overwrite:
        raise UserError(f"cannot write {path}: it exists")
    if path.exists() and not (path.is_dir() if kind == ".zarr" else path.is_file()):
        wanted = "folder" if kind == ".zarr" else "file"
        raise UserError(
            f"cannot write {path}: a {kind} is a {wanted}, and what is there is none; give another "
            "name"
        )
    if kind == ".zarr":
        load_library("zarr", "wsi")
    elif kind != ".npy":
        load_library("tifffile", "wsi")


def check_shape(sink: Any, map_shape: tuple[int, int, int]) -> None:
    """Check that a map [H, W, C] fits into an array [C, H, W]; a path takes any.

    Raises:
        UserError: It does not.
    """
    if isinstance(sink, (str, Path)):
        return
    height, width, channels = map_shape
    shape = tuple(int(n) for n in sink.shape)
    if shape != (channels, height, width):
        raise UserError(f"the map is {(channels, height, width)}, and the array for it {shape}")


def block_rows(sink: Any, map_shape: tuple[int, int, int], number_bytes: int, budget: int) -> int:
    """Rows of a map that are written together: those of chunks or tiles, or as many as fit.

    Args:
        sink: The place: an array, or a path.
        map_shape: Height, width and channels.
        number_bytes: Of a value of the map.
        budget: Bytes for a block with its copies.
    """
    height, width, channels = map_shape
    if isinstance(sink, (str, Path)):
        needed = None if Path(sink).suffix.lower() == ".npy" else TILE
    else:
        needed = chunk_length(sink, 1)
    fitting = budget // (COPIES * width * channels * number_bytes)
    return min(needed or max(min(fitting, TILE), 1), height)


class Writer(ABC):
    """Writes a map to its place, block by block.

    Attributes:
        rows: Of a block.
        where: Of the map, for messages.
    """

    where = "of the map"

    def __init__(self, made: Rows, rows: int) -> None:
        """Keep the map, of which no row is there yet, and the rows of a block."""
        self.made = made
        self.rows = rows
        self.done = 0

    def write_until(self, stop: int) -> None:
        """Write what is there and not written: whole blocks, and the end of the map.

        Args:
            stop: Rows of the map that are there.

        Raises:
            UserError: They cannot be written.
        """
        height = self.made.shape[0]
        while self.done < stop:
            end = min(self.done + self.rows, height)
            if end > stop:
                return
            try:
                self.write(self.done, end)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"cannot write rows {self.done} to {end} {self.where}: {one_line(error)}"
                ) from error
            self.done = end

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of the map as [C, stop - start, W]."""
        return self.made.read(start, stop)[0].permute(2, 0, 1)

    @abstractmethod
    def write(self, start: int, stop: int) -> None:
        """Write some rows."""


class ArrayWriter(Writer):
    """Writes into an array [C, H, W]: numpy, a tensor, zarr."""

    def __init__(self, made: Rows, rows: int, array: Any) -> None:
        """Check the array.

        Args:
            made: The map.
            rows: Of a block.
            array: The place.

        Raises:
            UserError: It has another shape than the map.
        """
        super().__init__(made, rows)
        check_shape(array, made.shape)
        self.array = array

    def write(self, start: int, stop: int) -> None:
        """See `Writer`."""
        part = self.read(start, stop)
        if isinstance(self.array, Tensor):
            self.array[:, start:stop] = part.to(self.array.device, self.array.dtype)
        else:
            self.array[:, start:stop] = numbers(part)


class FileWriter(Writer):
    """Writes a file, under a name of its own until it is whole.

    Attributes:
        file: What is open, if anything is.
    """

    file: Any = None

    def __init__(self, made: Rows, rows: int, path: Path) -> None:
        """Make the file, of its full size."""
        super().__init__(made, rows)
        self.path = Path(os.path.realpath(path))  # a link stays
        self.unfinished = self.path.with_name(f".{self.path.stem}.unfinished{path.suffix}")
        self.where = f"of {path}"
        self.dtype = numbers(torch.empty(0, dtype=made.dtype)).dtype
        try:
            self.begin()
        except UserError:
            raise
        except Exception as error:
            self.discard()
            raise UserError(f"cannot write {path}: {one_line(error)}") from error

    @abstractmethod
    def begin(self) -> None:
        """Make the file."""

    def end(self) -> None:
        """Write what comes after all rows, and close the file."""

    def finish(self) -> None:
        """Do what is left when all rows are written; the file gets its name."""
        try:
            self.end()
            if self.path.is_dir():
                shutil.rmtree(self.path)
            self.unfinished.replace(self.path)
        except Exception as error:
            raise UserError(f"cannot write {self.path}: {one_line(error)}") from error

    def discard(self) -> None:
        """Close the file, and take it away if it is not finished."""
        if self.file is not None:
            self.file.close()
        if self.unfinished.is_dir():
            shutil.rmtree(self.unfinished)
        else:
            self.unfinished.unlink(missing_ok=True)


class NumpyWriter(FileWriter):
    """A ``.npy`` file, [C, H, W]."""

    def begin(self) -> None:
        """See `FileWriter`."""
        height, width, channels = self.made.shape
        shape = (channels, height, width)
        descr = np.lib.format.dtype_to_descr(self.dtype)
        self.file = open(self.unfinished, "w+b", buffering=0)  # noqa: SIM115
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": descr, "fortran_order": False, "shape": shape}
        )
        # Not mapped into memory: a full disk is then an error and no signal.
        self.header = self.file.tell()
        reserve(self.file, self.header + math.prod(shape) * self.dtype.itemsize)

    def write(self, start: int, stop: int) -> None:
        """See `Writer`."""
        height, width, _ = self.made.shape
        rows = np.ascontiguousarray(numbers(self.read(start, stop)))
        for channel, values in enumerate(rows):
            place = (channel * height + start) * width * self.dtype.itemsize
            write_at(self.file, self.header + place, values)

    def end(self) -> None:
        """See `FileWriter`."""
        self.file.close()


class ZarrWriter(FileWriter):
    """A zarr array, [C, H, W], in chunks with all channels."""

    def begin(self) -> None:
        """See `FileWriter`."""
        height, width, channels = self.made.shape
        self.array = load_library("zarr", "wsi").open(
            str(self.unfinished),
            mode="w",
            shape=(channels, height, width),
            chunks=(channels, min(TILE, height), min(TILE, width)),
            dtype=self.dtype,
        )

    def write(self, start: int, stop: int) -> None:
        """See `Writer`."""
        self.array[:, start:stop] = numbers(self.read(start, stop))


class TiffWriter(FileWriter):
    """A BigTIFF of tiles, [H, W, C], with smaller levels in its SubIFDs.

    The file is made with empty tiles, which are filled in where they lie.
    """

    def begin(self) -> None:
        """See `FileWriter`."""
        tifffile = load_library("tifffile", "wsi")
        height, width, channels = self.made.shape
        levels = levels_of((height, width))
        colour = channels == 3 and self.dtype == np.uint8
        with tifffile.TiffWriter(self.unfinished, bigtiff=True) as file:
            for level in range(levels):
                file.write(
                    None,
                    shape=(*self._size(level), channels),
                    dtype=self.dtype,
                    tile=(TILE, TILE),
                    photometric="rgb" if colour else "minisblack",
                    planarconfig="contig",
                    metadata=None,
                    subifds=levels - 1 if level == 0 else 0,
                    subfiletype=1 if level else 0,
                )
        with tifffile.TiffFile(self.unfinished) as file:
            pages = [level.pages[0] for level in file.series[0].levels]
            self.offsets = [page.dataoffsets for page in pages]
        self.file = open(self.unfinished, "r+b", buffering=0)  # noqa: SIM115

    def _size(self, level: int) -> tuple[int, int]:
        height, width, _ = self.made.shape
        return -(-height // 2**level), -(-width // 2**level)

    def _fill(self, level: int, start: int, rows: np.ndarray) -> None:
        width = rows.shape[1]
        columns = range(0, width, TILE)
        for number, left in enumerate(columns, start // TILE * len(columns)):
            tile = np.zeros((TILE, TILE, rows.shape[2]), self.dtype)
            part = rows[:, left : left + TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            write_at(self.file, self.offsets[level][number], tile)

    def write(self, start: int, stop: int) -> None:
        """See `Writer`."""
        self._fill(0, start, numbers(self.made.read(start, stop)[0]))

    def end(self) -> None:
        """See `FileWriter`: the smaller levels."""
        for level in range(1, len(self.offsets)):
            height = self._size(level)[0]
            for start in range(0, height, TILE):
                stop = min(start + TILE, height)
                self._fill(level, start, self._level_rows(level, start, stop))
        self.file.close()

    def _level_rows(self, level: int, start: int, stop: int) -> np.ndarray:
        """Rows of a level, [rows, W, C]: means of 2^level rows and columns."""
        size = 2**level
        parts, some = [], max(TILE // size, 1)  # no more rows of the map at once than of a tile
        for first in range(start, stop, some):
            last = min((first + some) * size, stop * size, self.made.shape[0])
            x = self.made.read(first * size, last)
            mean = F.avg_pool2d(
                x.permute(0, 3, 1, 2).float(), size, ceil_mode=True, count_include_pad=False
            )
            parts.append(mean[0].permute(1, 2, 0).to(x.dtype))
        return numbers(torch.cat(parts))


class RasterWriter(FileWriter):
    """A cloud-optimised GeoTIFF (COG), over the ground that a raster of rasterio covers.

    GDAL makes COGs of whole rasters alone, so the rows are kept in a GeoTIFF beside it until then.
    """

    def __init__(self, made: Rows, rows: int, path: Path, raster: Any, stride: float) -> None:
        """Make the file.

        Args:
            made: The map.
            rows: Of a block.
            path: The file.
            raster: Of rasterio, whose place on the earth the map has.
            stride: Pixels of the raster in a row of the map.
        """
        self.raster = raster
        self.stride = stride
        self.collected = path.with_name(f".{path.stem}.rows{path.suffix}")
        super().__init__(made, rows, path)

    def begin(self) -> None:
        """See `FileWriter`."""
        rasterio = load_library("rasterio", "geo")
        height, width, channels = self.made.shape
        if self.dtype == np.float16:  # which GDAL has from 3.11 on alone
            self.dtype = np.dtype(np.float32)
        # A side that the stride does not divide: the last pixel reaches beyond the raster.
        transform = self.raster.transform * self.raster.transform.scale(self.stride, self.stride)
        profile = {
            "driver": "GTiff", "dtype": self.dtype, "count": channels, "height": height,
            "width": width, "crs": self.raster.crs, "transform": transform, "tiled": True,
            "blockxsize": TILE, "blockysize": TILE, "BIGTIFF": "IF_SAFER",
        }  # fmt: skip
        if np.issubdtype(self.dtype, np.floating):
            profile["nodata"] = np.nan  # what a mask leaves out, which means of levels pass over
        self.file = rasterio.open(self.collected, "w", **profile)

    def write(self, start: int, stop: int) -> None:
        """See `Writer`."""
        rows = numbers(self.read(start, stop)).astype(self.dtype, copy=False)
        self.file.write(rows, window=((start, stop), (0, self.made.shape[1])))

    def end(self) -> None:
        """See `FileWriter`: the COG, with its smaller levels."""
        self.file.close()
        load_library("rasterio.shutil", "geo").copy(
            self.collected, self.unfinished, driver="COG", blocksize=TILE, compress="NONE",
            overview_resampling="AVERAGE", bigtiff="IF_SAFER",
        )  # fmt: skip
        self.collected.unlink()

    def discard(self) -> None:
        """See `FileWriter`."""
        super().discard()
        self.collected.unlink(missing_ok=True)


class Writers:
    """The writers of a run: their files get their names together at its end, or are taken away."""

    def __init__(self, raster: Any) -> None:
        """Keep the image, if it is a raster of rasterio, whose place on the earth maps have."""
        self.raster = raster
        self.files: list[FileWriter] = []

    def open(self, made: Rows, rows: int, sink: Any, stride: float) -> Writer:
        """The writer of a map to its place.

        Args:
            made: The map.
            rows: Of a block, as `block_rows` gives them.
            sink: An array [C, H, W], or a path.
            stride: Pixels of the image in a row of the map.

        Raises:
            UserError: The place does not fit, or cannot be written.
        """
        if not isinstance(sink, (str, Path)):
            return ArrayWriter(made, rows, sink)
        file: FileWriter
        path = Path(sink).expanduser()
        kind = path.suffix.lower()
        if kind == ".npy":
            file = NumpyWriter(made, rows, path)
        elif kind == ".zarr":
            file = ZarrWriter(made, rows, path)
        elif self.raster is not None:
            file = RasterWriter(made, rows, path, self.raster, stride)
        else:
            file = TiffWriter(made, rows, path)
        self.files.append(file)
        return file

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                for file in self.files:
                    file.finish()
        finally:
            for file in self.files:
                file.discard()


def numbers(x: Tensor) -> np.ndarray:
    """A tensor as numpy has it; bfloat16 becomes float32."""
    return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()
