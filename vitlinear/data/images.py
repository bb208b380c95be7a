"""Image files: their bytes to pixels, and what is said of those that cannot be read."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from timm.data import get_img_extensions
from timm.utils.misc import natural_key

from vitlinear.errors import UserError, one_line

# What Pillow raises on damaged files, of whatever format; found by corrupting some thousands.
# EOFError, IndexError and OverflowError: by its documentation and older versions.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    Image.DecompressionBombError,
)


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


def decode(content: bytes) -> Image.Image:
    """Decodes a file's content, all of its pixels.

    Raises:
        One of `DAMAGE`: the content is not a whole image.
    """
    if not content:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Returns the image in a PIL mode.

    Grey images of 16 bits keep their upper 8: Pillow would cut every value at 255, which leaves
    most of them white.
    """
    if image.mode.startswith("I;16") and mode != image.mode:
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert(mode)


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Returns the files meant by ``inputs``: themselves, and the images below folders, in order."""
    found: list[Path] = []
    extensions = get_img_extensions(as_set=True)
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            below = [file for file in path.rglob("*") if file.suffix.lower() in extensions]
            if not below:
                raise UserError(
                    f"folder {path} holds no images ({', '.join(sorted(extensions))}): "
                    "give another, or name the files"
                )
            found += sorted(below, key=lambda file: natural_key(str(file)))
        else:
            raise UserError(f"image {path} does not exist")
    return found
