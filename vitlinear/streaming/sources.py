"""Images of any kind, read by rows: arrays, slides, rasters, and files of these.

A kind is told by what it can do, so that no library is imported that the image does not bring.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlinear.errors import Notice, UserError, one_line, pip_install

from .libraries import load_library

# Of GeoTIFF: tie points, a matrix, and keys.
EARTH_TAGS = (33922, 34264, 34735)
PALETTE = "the image holds numbers of a palette, not colours: convert it to RGB first"


class ImageSource(ABC):
    """An image that is read by rows.

    Attributes:
        shape: Height, width and channels.
        row_block: Rows that are stored together, such as the height of tiles.
        number_bytes: Bytes of a number, once it is read.
    """

    shape: tuple[int, int, int]
    row_block = 1
    number_bytes = 1

    def __init__(self) -> None:
        self._blocks: dict[int, Tensor] = {}

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [1, stop - start, W, C], as they are.

        Raises:
            UserError: They cannot be read, or are not all there.
        """
        if self.row_block == 1:
            return self._checked(start, stop).unsqueeze(0)
        rows: Tensor | None = None
        for number in range(start // self.row_block, -(-stop // self.row_block)):
            first = number * self.row_block
            last = min(first + self.row_block, self.shape[0])
            # Neighbouring bands share blocks: the last ones are kept.
            if number not in self._blocks:
                self._blocks = {n: x for n, x in self._blocks.items() if number - n in (1, -1)}
                self._blocks[number] = self._checked(first, last)
            block = self._blocks[number]
            if rows is None:
                rows = block.new_empty((stop - start, *self.shape[1:]))
            part = slice(max(start, first), min(stop, last))
            rows[part.start - start : part.stop - start] = block[
                part.start - first : part.stop - first
            ]
        assert rows is not None  # nobody asks for no row
        return rows.unsqueeze(0)

    @property
    def block_bytes(self) -> int:
        """Bytes that blocks take while rows are read: two that are kept, and one that comes."""
        width, channels = self.shape[1:]
        return 3 * self.row_block * width * channels * self.number_bytes

    def forget(self) -> None:
        """Give back the memory of the blocks that were read last."""
        self._blocks = {}

    def valid(self, start: int, stop: int) -> Tensor | None:
        """Where rows hold data, [1, stop - start, W, C or 1] bool; None where all of them do."""
        return None

    def _checked(self, start: int, stop: int) -> Tensor:
        try:
            rows = self.rows(start, stop)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"cannot read rows {start} to {stop} of the image: {one_line(error)}; what was "
                "finished stays"
            ) from error
        if tuple(rows.shape) != (stop - start, *self.shape[1:]):
            raise UserError(
                f"the image is truncated: rows {start} to {stop} came as {tuple(rows.shape)}; what "
                "was finished stays"
            )
        return rows

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, W, C]; any exception says that they cannot be read."""


class ArraySource(ImageSource):
    """An array: numpy, a memory map, zarr, or whatever is sliced alike; a tensor."""

    def __init__(self, array: Any, channels: int, layout: str | None) -> None:
        """Look at the array.

        Args:
            array: [C, H, W] or [H, W, C]; [H, W] of an image of one channel.
            channels: C.
            layout: ``'CHW'`` or ``'HWC'``; None to tell by the number of channels.

        Raises:
            UserError: The shape does not fit, or fits both ways.
        """
        super().__init__()
        shape = tuple(int(n) for n in array.shape)
        self.flat = len(shape) == 2 and channels == 1 and layout is None
        if self.flat:
            shape = (*shape, 1)
        fitting = [
            name
            for name, axis in (("CHW", 0), ("HWC", 2))
            if len(shape) == 3 and shape[axis] == channels and layout in (None, name)
        ]
        if self.flat:
            fitting = ["HWC"]
        if not fitting:
            raise UserError(
                f"the model takes images of {channels} channels, [{channels}, H, W] or "
                f"[H, W, {channels}]; got an array of shape {shape}"
                + (f" with layout {layout}" if layout else "")
            )
        if len(fitting) > 1:
            raise UserError(
                f"an array of shape {shape} could be CHW or HWC: give layout='CHW' or 'HWC'"
            )
        self.array = array
        self.channels_first = fitting[0] == "CHW"
        height, width = shape[1:] if self.channels_first else shape[:2]
        if height * width == 0:
            raise UserError(f"the image has no pixel: its shape is {shape}")
        self.shape = (height, width, channels)
        self.row_block = chunk_length(array, 1 if self.channels_first else 0) or 1
        self.number_bytes = bytes_of(getattr(array, "dtype", "uint8"))

    def rows(self, start: int, stop: int) -> Tensor:
        """See `ImageSource`."""
        part = self.array[:, start:stop] if self.channels_first else self.array[start:stop]
        rows = as_tensor(part)
        forget_pages(self.array)
        if self.flat:
            rows = rows.unsqueeze(-1)
        return rows.permute(1, 2, 0) if self.channels_first else rows


class SlideSource(ImageSource):
    """A slide of tiffslide or openslide, or whatever has their `read_region`."""

    def __init__(self, slide: Any, channels: int, level: int) -> None:
        """Look at the slide.

        Args:
            slide: Has `level_dimensions`, `level_downsamples` and `read_region`.
            channels: Of the model: 3.
            level: Of the pyramid; 0 has all pixels.

        Raises:
            UserError: There is no such level, or the model takes other images.
        """
        super().__init__()
        levels = len(slide.level_dimensions)
        if not 0 <= level < levels:
            raise UserError(f"the slide has no level {level}: it has levels 0 to {levels - 1}")
        if channels != 3:
            raise UserError(f"a slide has 3 channels, and the model takes {channels}")
        width, height = slide.level_dimensions[level]
        self.slide = slide
        self.level = level
        self.shape = (height, width, 3)
        self.row_block = 256

    def rows(self, start: int, stop: int) -> Tensor:
        """See `ImageSource`; transparent pixels are white, as viewers show them."""
        # Places are counted at level 0.
        top = round(start * self.slide.level_downsamples[self.level])
        size = (self.shape[1], stop - start)
        pixels = np.asarray(self.slide.read_region((0, top), self.level, size))
        if pixels.shape[-1] == 4:
            clear = pixels[..., 3:] == 0
            pixels = np.where(clear, np.uint8(255), pixels[..., :3])
        return as_tensor(pixels)


class RasterSource(ImageSource):
    """A raster of rasterio, or whatever has its `read(window=...)`."""

    def __init__(self, raster: Any, channels: int) -> None:
        """Look at the raster.

        Args:
            raster: Has `count`, `height`, `width` and `read`.
            channels: Of the model; the first ones of the raster are taken.

        Raises:
            UserError: The raster has too few, or holds numbers of a palette.
        """
        super().__init__()
        if raster.count < channels:
            raise UserError(
                f"the raster has {raster.count} bands, and the model takes {channels} channels"
            )
        meanings = getattr(raster, "colorinterp", ())[:channels]
        if any(meaning.name == "palette" for meaning in meanings):
            raise UserError(PALETTE)
        self.raster = raster
        flags = getattr(raster, "mask_flag_enums", ())[:channels]
        self.has_gaps = any(flag.name != "all_valid" for band in flags for flag in band)
        self.shape = (raster.height, raster.width, channels)
        blocks = getattr(raster, "block_shapes", None)
        self.row_block = int(blocks[0][0]) if blocks else 1
        self.number_bytes = bytes_of(getattr(raster, "dtypes", ["uint8"])[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """See `ImageSource`."""
        return as_tensor(self._call(self.raster.read, start, stop)).permute(1, 2, 0)

    def valid(self, start: int, stop: int) -> Tensor | None:
        """See `ImageSource`: by the raster's mask, or its value for missing data.

        A pixel of integers is missing if it is in all bands: that value may be a colour in one.
        """
        if not self.has_gaps:
            return None
        masks = np.asarray(self._call(self.raster.read_masks, start, stop)) > 0
        found = torch.from_numpy(masks).permute(1, 2, 0).unsqueeze(0)
        integers = np.issubdtype(np.dtype(self.raster.dtypes[0]), np.integer)
        return found.any(-1, keepdim=True) if integers else found

    def _call(self, method: Callable[..., Any], start: int, stop: int) -> Any:
        """Let a method of the raster give rows of the bands that are channels."""
        _, width, channels = self.shape
        return method(list(range(1, channels + 1)), window=((start, stop), (0, width)))


def open_source(
    source: Any, channels: int, layout: str | None = None, level: int = 0
) -> ImageSource:
    """An image of any kind.

    Args:
        source: An array, a slide, a raster, or the path of a file of these.
        channels: Of the images that the model takes.
        layout: Of an array.
        level: Of a pyramid: of a file of TIFF, or a slide.

    Raises:
        UserError: It is none of these, does not fit the model, has no such level, or needs a
            library that is missing.
    """
    if isinstance(source, (str, Path)):
        source = open_file(Path(source).expanduser(), level)
        level = 0  # which the file is opened at
    if hasattr(source, "read_region") and hasattr(source, "level_dimensions"):
        return SlideSource(source, channels, level)
    if level:
        raise UserError(
            f"{type(source).__name__} has no level {level}: give a slide or the path of a TIFF "
            "file, or open the level yourself, as rasterio.open(path, overview_level=N) does"
        )
    if hasattr(source, "read") and hasattr(source, "count") and hasattr(source, "height"):
        return RasterSource(source, channels)
    if hasattr(source, "shape") and hasattr(source, "__getitem__"):
        return ArraySource(source, channels, layout)
    raise UserError(
        f"cannot read an image from {type(source).__name__}: give an array, a slide (tiffslide, "
        "openslide), a raster (rasterio), or the path of a file"
    )


def open_file(path: Path, level: int) -> Any:
    """An array or a raster of a file.

    Args:
        path: ``.npy``, a ``.zarr`` folder, or a TIFF: of any kind with tifffile, one with places on
            the earth with rasterio where that is installed.
        level: Of a pyramid.

    Raises:
        UserError: There is no such file or level, its kind is not known, it holds numbers of a
            palette, or a library is missing.
    """
    if not path.exists():
        raise UserError(f"there is no image {path}")
    kind = path.suffix.lower()
    if level and kind in (".npy", ".zarr"):
        raise UserError(f"{path} has no level {level}: {kind} files have one alone")
    try:
        if kind == ".npy":
            return np.load(path, mmap_mode="r")
        if kind == ".zarr":
            return load_library("zarr", "wsi").open(str(path), mode="r")
        if kind in (".tif", ".tiff"):
            raster = _raster_on_earth(path, level)
            if raster is not None:
                return raster
        if kind in (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".qptiff"):
            zarr = load_library("zarr", "wsi")
            tifffile = load_library("tifffile", "wsi")
            _check_tags(tifffile, path, kind)
            store = tifffile.imread(path, aszarr=True, level=level)
            return zarr.open(store, mode="r")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    raise UserError(
        f"cannot read {path}: rows of {kind or 'such'} files cannot be read by themselves; give a "
        ".npy, .zarr or TIFF file, or an array"
    )


def _raster_on_earth(path: Path, level: int) -> Any:
    """A raster of rasterio, if that is installed and the file has a place on the earth."""
    try:
        import rasterio
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        raster = rasterio.open(path)
        if raster.crs is None:
            return None
        return rasterio.open(path, overview_level=level - 1) if level else raster


def _check_tags(tifffile: Any, path: Path, kind: str) -> None:
    """Refuse numbers of a palette, and tell of a place on the earth that maps will not have."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise UserError(PALETTE)
        on_earth = any(tag in page.tags for tag in EARTH_TAGS)
    if on_earth and kind in (".tif", ".tiff") and importlib.util.find_spec("rasterio") is None:
        warnings.warn(
            f"{path} has a place on the earth, which maps of it will not have: that needs rasterio "
            f"({pip_install('geo')})",
            Notice,
            stacklevel=2,
        )


def forget_pages(array: Any) -> None:
    """Let pages of a memory map that were read or written not count as memory of the process."""
    mapped: Any = getattr(array, "_mmap", None)
    # Of one that copies what is written (mode c), the changes would be forgotten too.
    if isinstance(array, np.memmap) and array.mode != "c" and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def chunk_length(array: Any, axis: int) -> int | None:
    """Length of an array's chunks along an axis, the first one of those of dask; None without."""
    chunks = getattr(array, "chunks", None)
    if not isinstance(chunks, (tuple, list)):
        return None
    length = chunks[axis]
    return int(length[0] if isinstance(length, (tuple, list)) else length)


def bytes_of(dtype: Any) -> int:
    """Bytes of a number of numpy's or torch's type once it is read: see `as_tensor`."""
    name = str(dtype).removeprefix("torch.")
    if name.endswith(("uint16", "u2")):
        return 4
    return int(getattr(dtype, "itemsize", None) or np.dtype(name).itemsize)


def as_tensor(part: Any) -> Tensor:
    """A tensor of a tensor or of whatever numpy can read; 16 bits without a sign become 32.

    Raises:
        UserError: It holds what is neither a pixel nor a floating-point number.
    """
    array = part if isinstance(part, Tensor) else np.asarray(part)
    name = getattr(array.dtype, "name", str(array.dtype).removeprefix("torch."))
    if "float" not in name and name not in ("uint8", "uint16"):
        raise UserError(
            f"the image holds {name}: give pixels of uint8 or uint16, or "
            "floating-point numbers, which are taken as they are"
        )
    if isinstance(array, Tensor):
        return array.to(torch.int32) if array.dtype == torch.uint16 else array
    if name == "uint16":
        array = array.astype(np.int32)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


def levels_of(shape: tuple[int, int], smallest: int = 512) -> int:
    """Levels of a pyramid whose last one has no side longer than this."""
    return 1 + max(math.ceil(math.log2(max(shape) / smallest)), 0)
