"""Image files: their bytes to pixels, and what is said of those that cannot be read."""

import io
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from vitlinear.errors import UserError, one_line

# What reading an image raises where its file is damaged, or gone.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    Image.DecompressionBombError,
)
BACKGROUND = "white"  # behind transparent pixels, in modes without transparency
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
# What brings an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where an image holds its orientation.
EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


class UnreadableImage(Exception):
    """An image that cannot be read; callers decide whether that is the user's error.

    Attributes:
        name: File, or what else the image is known by.
        reason: Why, in a few words on one line.
    """

    def __init__(self, name: str | Path, error: BaseException) -> None:
        super().__init__(name, error)
        self.name, self.reason = printable(str(name)), reason(error)

    def as_user_error(self, advice: str = "replace or remove it") -> UserError:
        """Returns the error that a command ends with."""
        return UserError(f"cannot read image {self.name}: {self.reason}; {advice}")


def printable(name: str) -> str:
    """Returns a file name as UTF-8 text on one line without tabs, whatever bytes it has."""
    for char, escape in (("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        name = name.replace(char, escape)
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def reason(error: BaseException) -> str:
    """Returns why an image cannot be read, without the address of some file object."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return one_line(error)


def decode(content: bytes | Image.Image) -> Image.Image:
    """Decodes a file's content, all of its pixels, as they are stored; an image is one already.

    Raises:
        One of `DAMAGE`: the content is not a whole image.
    """
    if isinstance(content, Image.Image):
        return content
    if not content:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (*DAMAGE, MemoryError):
        raise
    except Exception as error:  # several of Pillow's decoders have errors of their own
        raise ValueError(one_line(error)) from error
    return image


def pixels(content: bytes | Image.Image, mode: str) -> Image.Image:
    """Turns a file's content into the image that models get: the one way there, of every command.

    The image is upright, as its EXIF orientation says. Where ``mode`` has no transparency, it lies
    on `BACKGROUND`. Grey values of more than 8 bits are scaled as `Depth` says. Of several frames
    or pages it is the first.

    Args:
        content: Of the file, or an image where there is no file.
        mode: PIL mode with 8 bits a channel.

    Raises:
        One of `DAMAGE`: the content is not a whole image.
    """
    return _in_mode(_shallow(upright(decode(content))), mode)


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8: 1, upright, where none is said or it is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*DAMAGE, KeyError, TypeError, struct.error):  # the pixels are whole
        return 1
    return value if value in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """Returns an image turned or mirrored as its EXIF orientation says, and without that."""
    turn = TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key not in EXIF_KEYS}
    return turned


class Depth(NamedTuple):
    """The values of a grey image of more than 8 bits.

    What becomes 0 to 255 is the range of the type: 0 to 65535 of integers, of 16 and of 32 bits,
    and 0 to 1 of floats.

    Attributes:
        least: The least finite value.
        greatest: The greatest.
        full: The greatest of the range of the type.
    """

    least: float
    greatest: float
    full: float

    @property
    def outside(self) -> bool:
        """Whether values are outside of the range, and the image's own is taken in its place."""
        return self.least < 0 or self.greatest > self.full

    @property
    def dark(self) -> bool:
        """Whether the values use a 16th of the range at most, and the image is nearly black."""
        return not self.outside and self.greatest <= self.full / 16


def is_deep(mode: str) -> bool:
    """Whether pixels of a PIL mode have more than 8 bits a channel."""
    return mode.startswith(("I", "F"))


def depth(image: Image.Image) -> Depth:
    """Returns what values an image has whose mode `is_deep`.

    Raises:
        ValueError: None is a finite number.
    """
    values = _values(image)
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("no pixel is a finite number")
    return Depth(float(values.min()), float(values.max()), 1 if image.mode == "F" else 65535)


def _values(image: Image.Image) -> np.ndarray:
    return np.asarray(image if image.mode == "F" else image.convert("I"))


def _shallow(image: Image.Image) -> Image.Image:
    """Returns an image with 8 bits a channel."""
    if not is_deep(image.mode):
        return image
    values, met = _values(image), depth(image)
    if met.outside:
        warnings.warn(
            "images with floats outside 0 to 1, or integers outside 0 to 65535, are scaled by "
            "their own least and greatest values; `vitlinear check-data` lists them",
            stacklevel=2,
        )
        spread = max(met.greatest - met.least, 1e-30)
        levels = _levels((values.astype(np.float64) - met.least) / spread)
    else:
        levels = _levels(values) if image.mode == "F" else (values >> 8).astype(np.uint8)
    shallow = Image.fromarray(levels)
    key = image.info.get("transparency")
    if isinstance(key, int):  # the value that is not seen
        shallow.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return shallow


def _levels(values: np.ndarray) -> np.ndarray:
    """Returns 0 to 255 for 0 to 1; what is no number is 0."""
    return np.rint(255 * np.nan_to_num(values, nan=0, posinf=1, neginf=0).clip(0, 1)).astype(
        np.uint8
    )


def has_transparency(image: Image.Image) -> bool:
    """Whether an image has pixels through which one can see."""
    if "transparency" not in image.info and image.mode not in TRANSPARENT:
        return False
    return bool(np.asarray(_with_alpha(image).getchannel("A")).min() < 255)


def _with_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # Pillow knows one way back from premultiplied colours
        image = image.convert(image.mode.upper())
    return image.convert("RGBA")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Returns an image of 8 bits a channel in another such mode."""
    if image.mode == mode and "transparency" not in image.info:
        return image
    if "transparency" in image.info or image.mode in TRANSPARENT:
        image = _with_alpha(image)
        if mode not in TRANSPARENT:
            below = Image.new("RGBA", image.size, BACKGROUND)
            image = Image.alpha_composite(below, image).convert("RGB")
    elif image.mode not in ("L", "RGB") and mode != "RGB":
        image = image.convert("RGB")  # from and to which Pillow converts every mode
    if mode == "LAB" and image.mode != "RGB":
        image = image.convert("RGB")
    return image.convert(mode)
