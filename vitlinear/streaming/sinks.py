"""Places that maps are written to by rows: arrays, zarr, TIFF with a pyramid, GeoTIFF."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlinear.errors import UserError, one_line

from .libraries import load_library
from .maps import RowMap
from .sources import levels_of

TILE = 256  # rows and columns of tiles and chunks, as most readers have them
KINDS = ".npy, .zarr, .tif or .tiff"


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
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")
    if path.exists() and not overwrite:
        raise UserError(f"cannot write {path}: it exists")
    if kind == ".zarr":
        load_library("zarr", "wsi")
    elif kind != ".npy":
        load_library("tifffile", "wsi")


def write_map(made: RowMap, sink: Any, raster: Any = None, stride: int = 1) -> None:
    """Write a map, rows by rows.

    Args:
        made: The map.
        sink: An array [C, H, W], or a path.
        raster: Of rasterio, whose place on the earth the map has; None without.
        stride: Pixels of the raster in a row of the map.

    Raises:
        UserError: The place does not fit, or cannot be written.
    """
    if not isinstance(sink, (str, Path)):
        _write_array(made, sink, _chunk_rows(sink))
        return
    path = Path(sink).expanduser()
    # Under a name of its own until it is whole.
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        _write_file(made, unfinished, raster, stride)
        _replace(unfinished, path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


def _write_file(made: RowMap, path: Path, raster: Any, stride: int) -> None:
    height, width, channels = made.shape
    kind = path.suffix.lower()
    dtype = numbers(made.read(0, 1)).dtype
    if kind == ".npy":
        array = np.lib.format.open_memmap(path, "w+", dtype, (channels, height, width))
        _write_array(made, array, TILE)
        array.flush()
    elif kind == ".zarr":
        array = load_library("zarr", "wsi").open(
            str(path),
            mode="w",
            shape=(channels, height, width),
            chunks=(channels, min(TILE, height), min(TILE, width)),
            dtype=dtype,
        )
        _write_array(made, array, TILE)
    elif raster is not None:
        _write_raster(made, path, dtype, raster, stride)
    else:
        _write_pyramid(made, path, dtype)


def numbers(x: Tensor) -> np.ndarray:
    """A tensor as numpy has it; bfloat16 becomes float32."""
    return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()


def _chunk_rows(array: Any) -> int:
    chunks = getattr(array, "chunks", None)
    return int(chunks[1]) if chunks else TILE


def _write_array(made: RowMap, array: Any, rows: int) -> None:
    height, width, channels = made.shape
    shape = tuple(int(n) for n in array.shape)
    if shape != (channels, height, width):
        raise UserError(f"the map is {(channels, height, width)}, and the array for it {shape}")
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        part = made.read(start, stop)[0].permute(2, 0, 1)
        try:
            if isinstance(array, Tensor):
                array[:, start:stop] = part.to(array.device, array.dtype)
            else:
                array[:, start:stop] = numbers(part)
        except Exception as error:
            raise UserError(
                f"cannot write rows {start} to {stop} of the map: {one_line(error)}"
            ) from error


def _level_rows(made: RowMap, level: int, start: int, stop: int) -> np.ndarray:
    """Rows of a level of the pyramid, [rows, W, C]: means of 2^level rows and columns."""
    size = 2**level
    if level == 0:
        return numbers(made.read(start, stop)[0])
    parts, some = [], max(TILE // size, 1)  # no more rows of the map at once than of a tile
    for first in range(start, stop, some):
        x = made.read(first * size, min((first + some) * size, stop * size, made.shape[0]))
        x = F.avg_pool2d(
            x.permute(0, 3, 1, 2).float(), size, ceil_mode=True, count_include_pad=False
        )
        parts.append(x[0].permute(1, 2, 0).to(made.dtype))
    return numbers(torch.cat(parts))


def _tiles(made: RowMap, level: int) -> Iterator[np.ndarray]:
    height, width, _ = _level_shape(made, level)
    for top in range(0, height, TILE):
        rows = _level_rows(made, level, top, min(top + TILE, height))
        for left in range(0, width, TILE):
            yield np.ascontiguousarray(rows[:, left : left + TILE])


def _level_shape(made: RowMap, level: int) -> tuple[int, int, int]:
    height, width, channels = made.shape
    return -(-height // 2**level), -(-width // 2**level), channels


def _write_pyramid(made: RowMap, path: Path, dtype: np.dtype) -> None:
    """A BigTIFF of tiles, [H, W, C], with smaller levels in its SubIFDs."""
    tifffile = load_library("tifffile", "wsi")
    levels = levels_of(made.shape[:2])
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(levels):
            file.write(
                _tiles(made, level),
                shape=_level_shape(made, level),
                dtype=dtype,
                tile=(TILE, TILE),
                photometric="minisblack",
                planarconfig="contig",
                metadata=None,
                subifds=levels - 1 if level == 0 else 0,
                subfiletype=1 if level else 0,
            )


def _write_raster(made: RowMap, path: Path, dtype: np.dtype, raster: Any, stride: int) -> None:
    """A GeoTIFF of tiles, over the ground that a raster of rasterio covers."""
    rasterio = load_library("rasterio", "geo")
    height, width, channels = made.shape
    # A side that the stride does not divide: the last pixel reaches beyond the raster.
    transform = raster.transform * raster.transform.scale(stride, stride)
    profile = {
        "driver": "GTiff", "dtype": dtype, "count": channels, "height": height, "width": width,
        "crs": raster.crs, "transform": transform, "tiled": True, "blockxsize": TILE,
        "blockysize": TILE, "BIGTIFF": "IF_SAFER",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        for start in range(0, height, TILE):
            stop = min(start + TILE, height)
            rows = numbers(made.read(start, stop)[0].permute(2, 0, 1))
            file.write(rows, window=((start, stop), (0, width)))


def _replace(unfinished: Path, path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    unfinished.replace(path)
