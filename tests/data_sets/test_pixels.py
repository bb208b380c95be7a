"""The way from a file to pixels: upright, transparency on white, depth by its range, any mode."""

import io
import itertools
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from timm.data import create_transform

from tests.commands import Command
from tests.data_sets.shards import add_sample
from tests.train.helpers import image_folder, tiny_flags
from vitlinear.data import check_data, images
from vitlinear.data import dataset as data
from vitlinear.errors import UserError

RANDOM = np.random.RandomState(0)
PIXELS = RANDOM.randint(0, 256, (6, 9, 3)).astype(np.uint8)
LOSSLESS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True, "exact": True}}
# What is stored, for an orientation, of an image that is to be seen as it is: from EXIF's own
# words, where the stored row 0 and column 0 are to be seen.
STORED = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],  # top, right
    3: lambda seen: seen[::-1, ::-1],  # bottom, right
    4: lambda seen: seen[::-1],  # bottom, left
    5: lambda seen: seen.swapaxes(0, 1),  # left, top
    6: lambda seen: seen[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda seen: seen[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda seen: seen[::-1].swapaxes(0, 1),  # left, bottom
}


def content(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(seen: np.ndarray, orientation: int, kind: str, **options: Any) -> bytes:
    """A file whose stored pixels have to be turned to be seen as ``seen``."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.ascontiguousarray(STORED[orientation](seen))
    return content(Image.fromarray(stored), kind, exif=exif, **options)


def array(file: bytes | Image.Image, mode: str = "RGB") -> np.ndarray:
    image = images.pixels(file, mode)
    assert image.mode == mode
    return np.asarray(image)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_images_are_upright(orientation: int, kind: str) -> None:
    file = turned(PIXELS, orientation, kind, **LOSSLESS.get(kind, {}))
    assert np.array_equal(array(file), PIXELS)
    once = images.pixels(file, "RGB")
    assert np.array_equal(array(once), PIXELS), "turned twice"


@pytest.mark.parametrize("orientation", STORED)
def test_photographs_are_upright(orientation: int) -> None:
    smooth = np.add.outer(20 * np.arange(6), 10 * np.arange(9)).astype(np.uint8)
    found = array(turned(smooth, orientation, "JPEG", quality=100), "L")
    assert np.abs(found.astype(int) - smooth).max() <= 3


def test_a_damaged_exif_block_says_nothing() -> None:
    """The pixels are whole: the image is taken as it is stored."""
    blocks: list[Any] = [b"MM\0*\xff\xff\xff\xff", b"rubbish", b"II*\0\x08\0\0\0\xff\xff"]
    blocks = [b"Exif\0\0" + block for block in blocks]
    for value in (0, 9, 77):
        blocks.append(Image.Exif())
        blocks[-1][ExifTags.Base.Orientation] = value
    for block in blocks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of the block
            file = content(Image.fromarray(PIXELS), "PNG", exif=block)
            assert np.array_equal(array(file), PIXELS)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(colours * share + 255 * (1 - share))


ALPHA = RANDOM.randint(0, 256, PIXELS.shape[:2]).astype(np.uint8)
ALPHA[0], ALPHA[1] = 0, 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparent_pixels_lie_on_white(kind: str) -> None:
    rgba = Image.fromarray(np.dstack([PIXELS, ALPHA]), "RGBA")
    file = content(rgba, kind, **LOSSLESS.get(kind, {}))
    expected = over_white(PIXELS, ALPHA)
    assert np.abs(array(file) - expected).max() <= 1
    assert (array(file)[0] == 255).all() and np.array_equal(array(file)[1], PIXELS[1])
    assert (array(file, "L")[0] == 255).all()
    assert np.array_equal(array(file, "RGBA"), np.dstack([PIXELS, ALPHA]))  # a channel for it
    grey = content(Image.fromarray(np.dstack([PIXELS[..., 0], ALPHA]), "LA"), "PNG")
    for mode in ("L", "RGB", "CMYK", "YCbCr", "HSV", "LAB"):
        seen = np.asarray(images.pixels(grey, mode).convert("RGB" if mode == "L" else mode))
        white = np.asarray(
            images.pixels(Image.new("L", (1, 1), "white"), mode).convert(
                "RGB" if mode == "L" else mode
            )
        )
        assert (seen[0] == white[0, 0]).all()
    assert np.array_equal(array(grey, "LA")[..., 1], ALPHA)


@pytest.mark.quick("data")
def test_transparent_colours_lie_on_white() -> None:
    """Of palettes, by index or with an alpha each, and of PNG's tRNS in grey and colour."""
    palette = Image.fromarray(PIXELS).quantize(4)
    indices, colours = np.asarray(palette), np.array(palette.getpalette()[:12]).reshape(4, 3)
    one = array(content(palette, "PNG", transparency=1))
    assert (one[indices == 1] == 255).all()
    assert np.array_equal(one[indices == 2], np.broadcast_to(colours[2], one[indices == 2].shape))
    assert (array(content(palette, "GIF", transparency=2))[indices == 2] == 255).all()
    half = array(content(palette, "PNG", transparency=bytes([255, 128, 0, 255])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array(content(palette, "PNG", transparency=bytes([255, 128, 0, 255])), "L")
    assert (half[indices == 2] == 255).all() and np.array_equal(
        half[indices == 0], one[indices == 0]
    )
    assert np.abs(half[indices == 1] - (colours[1] * 128 / 255 + 127)).max() <= 1
    grey = PIXELS[..., 0]
    key = int(grey[3, 3])
    found = array(content(Image.fromarray(grey), "PNG", transparency=key), "L")
    assert np.array_equal(found, np.where(grey == key, 255, grey))
    deep = grey.astype(np.uint16) * 257
    found = array(content(Image.fromarray(deep), "PNG", transparency=key * 257), "L")
    assert np.array_equal(found, np.where(grey == key, 255, grey))
    colour = content(Image.fromarray(PIXELS), "PNG", transparency=tuple(map(int, PIXELS[2, 2])))
    assert (array(colour)[2, 2] == 255).all() and np.array_equal(array(colour)[3:], PIXELS[3:])


LEVELS = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (LEVELS.astype(np.uint16) * 257, "PNG"),
        (LEVELS.astype(np.uint16) * 257, "TIFF"),
        (LEVELS.astype(np.uint16) * 257, "PPM"),
        (LEVELS.astype(np.int32) * 257, "TIFF"),
        (LEVELS.astype(np.float32) / 255, "TIFF"),
    ],
)  # fmt: skip
def test_depth_is_scaled_by_the_range_of_the_type(values: np.ndarray, kind: str) -> None:
    file = content(Image.fromarray(values), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(array(file, "L"), LEVELS)
        assert np.array_equal(array(file)[..., 2], LEVELS)


@pytest.mark.parametrize("order", ["I;16L", "I;16B"])
def test_both_orders_of_bytes(order: str) -> None:
    values = (LEVELS.astype(np.uint16) * 257).astype(">u2" if order.endswith("B") else "<u2")
    assert np.array_equal(array(Image.frombytes(order, (16, 16), values.tobytes()), "L"), LEVELS)


@pytest.mark.parametrize(
    "values",
    [
        LEVELS.astype(np.float32),
        LEVELS.astype(np.float32) * 300 - 5000,
        LEVELS.astype(np.int32) * 100000,
        LEVELS.astype(np.int32) - 128,
    ],
)
def test_values_outside_the_range_are_scaled_by_their_own_with_a_warning(
    values: np.ndarray,
) -> None:
    file = content(Image.fromarray(values), "TIFF")
    with pytest.warns(UserWarning, match="own least and greatest values"):
        assert np.array_equal(array(file, "L"), LEVELS)


def test_pixels_that_are_no_numbers() -> None:
    values = np.array([[0, 0.2, 1], [np.nan, np.inf, -np.inf]], np.float32)
    assert array(Image.fromarray(values), "L").tolist() == [[0, 51, 255], [0, 255, 0]]
    values = np.array([[-1, 0, 3], [np.nan, np.inf, -np.inf]], np.float32)
    with pytest.warns(UserWarning, match="own least"):
        assert array(Image.fromarray(values), "L").tolist() == [[0, 64, 255], [0, 255, 0]]
    with pytest.raises(ValueError, match="no pixel is a finite number"):
        images.pixels(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "L")
    with pytest.warns(UserWarning, match="own least"):
        assert array(Image.fromarray(np.full((2, 2), 7, np.float32)), "L").tolist() == [[0, 0]] * 2


STORED_MODES = (*data.MODES, "1", "P", "PA", "La", "RGBa", "I", "F", "I;16")


def test_every_mode_becomes_every_other() -> None:
    """Red, green, blue and greys stay what they are, as far as a mode can say it."""
    colours = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (102, 102, 102)]], np.uint8)
    rgb = Image.fromarray(colours)
    for stored, mode in itertools.product(STORED_MODES, data.MODES):
        source = rgb.convert("P").convert(stored) if stored == "PA" else rgb
        if stored in ("I", "F", "I;16"):
            source = rgb.convert("L").convert("I")
        if stored in ("La", "RGBa"):
            source = rgb.convert(stored.upper())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of floats up to 255
            found = images.pixels(source.convert(stored), mode)
        assert (found.mode, found.size) == (mode, (2, 2))
        if stored in ("RGB", "RGBA", "CMYK", "HSV", "P", "RGBa") and mode in ("RGB", "RGBA"):
            assert np.abs(np.asarray(found)[..., :3].astype(int) - colours).max() <= 2


def odd_images(folder: Path) -> dict[str, np.ndarray]:
    """Files that used to be read in several ways; returns the pixels that they are, by name."""
    seen = np.repeat(np.repeat(PIXELS, 6, 0), 4, 1)
    alpha = np.repeat(np.repeat(ALPHA, 6, 0), 4, 1)
    one = seen[..., 0]
    grey = np.dstack([one] * 3)
    files = {
        "turned.png": (turned(seen, 6, "PNG"), seen),
        "clear.png": (
            content(Image.fromarray(np.dstack([seen, alpha]), "RGBA"), "PNG"),
            over_white(seen, alpha),
        ),
        "float.tif": (
            content(Image.fromarray(seen[..., 0].astype(np.float32) / 255), "TIFF"),
            grey,
        ),
        "integer.tif": (
            content(Image.fromarray(seen[..., 0].astype(np.int32) * 257), "TIFF"),
            grey,
        ),
        "sixteen.png": (
            content(Image.fromarray(seen[..., 0].astype(np.uint16) * 257), "PNG"),
            grey,
        ),
    }
    folder.mkdir(parents=True)
    for name, (file, _) in files.items():
        (folder / name).write_bytes(file)
    return {name: pixels for name, (_, pixels) in files.items()}


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A data set with `odd_images` in one class."""
    root = image_folder(tmp_path / "odd", train=1, val=1)
    (root / "train/ant/0.png").unlink()
    (root / "train/ant").rmdir()
    return root, odd_images(root / "train" / "ant")


def test_every_kind_of_data_gives_the_same_pixels(
    odd: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="pip install 'vitlinear[data]'")
    pytest.importorskip("webdataset", reason="pip install 'vitlinear[data]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    root, expected = odd
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train.tar", "w") as tar:
        tar.add(root / "train", arcname=".")
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "a.tar", "w") as tar:
        for name in sorted(expected):
            stem, _, suffix = name.partition(".")
            file = (root / "train/ant" / name).read_bytes()
            add_sample(tar, stem, {suffix: file, "cls": b"0"})
    kinds = {
        None: {"data_dir": str(root)},
        "": {"data_dir": str(tmp_path / "tars")},
        "wds/": {"data_dir": str(shards), "split": f"a.tar|{len(expected)}", "num_classes": 1},
        f"hfds/{root}": {},
        f"hfids/{root}": {"split": "train"},
        "torch/image_folder": {"data_dir": str(root)},
    }
    for name, options in kinds.items():
        options = {"split": "train", **options}
        dataset = data.open_dataset(name, train=False, mode="RGB", **options)
        read = [np.asarray(image) for image, label in dataset if label == 0]
        assert len(read) == len(expected), name
        for file, found in zip(sorted(expected), read, strict=True):
            assert found.shape == expected[file].shape, (name, file)
            assert np.abs(found - expected[file]).max() <= 1, (name, file)


def test_every_command_gives_the_same_pixels(
    odd: tuple[Path, dict[str, np.ndarray]],
    images: Path,
    checkpoint: Path,
    command: Command,
    tmp_path: Path,
) -> None:
    """Predictions for a file and for the pixels that it is; calibration; what detectors see."""
    from vitlinear.checkpoints.card import read_card
    from vitlinear.export import calibration

    root, expected = odd
    plain = tmp_path / "plain"
    plain.mkdir()
    for name, pixels in expected.items():
        Image.fromarray(pixels.astype(np.uint8)).save(plain / f"{name}.png")
    flags = ("--checkpoint", checkpoint, "--json")
    found, right = (
        json.loads(command("predict", folder, *flags).out)
        for folder in (root / "train" / "ant", plain)
    )
    for first, second in zip(found, right, strict=True):
        assert Path(first["file"]).name == Path(second["file"]).name.removesuffix(".png")
        for one, other in zip(first["predictions"], second["predictions"], strict=True):
            assert one["class"] == other["class"]
            assert one["probability"] == pytest.approx(other["probability"], abs=0.01)
    card = read_card(checkpoint)
    assert card is not None
    transform = create_transform(**card.data_config.as_dict(), is_training=False)
    tensors = [
        calibration._of_folder(str(folder), "RGB", transform, len(expected))
        for folder in (root / "train" / "ant", plain)
    ]
    for one, other in zip(*tensors, strict=True):
        assert torch.allclose(one, other, atol=0.02)


@pytest.mark.openmmlab
def test_dense_models_see_the_same_pixels(odd: tuple[Path, dict[str, np.ndarray]]) -> None:
    pytest.importorskip("mmcv", reason="pip install 'vitlinear[openmmlab]'")
    from vitlinear.dense.openmmlab.detect_segment import _read

    root, expected = odd
    for name, pixels in expected.items():
        assert np.abs(np.asarray(_read(root / "train/ant" / name)) - pixels).max() <= 1


def test_check_data_reports_what_it_met(odd: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, _ = odd
    ant = root / "train" / "ant"
    Image.fromarray(LEVELS.astype(np.float32)).save(ant / "outside.tif")
    Image.fromarray(LEVELS.astype(np.uint16)).save(ant / "dark.png")
    Image.fromarray(LEVELS).save(
        ant / "pages.tif", save_all=True, append_images=[Image.fromarray(LEVELS.T.copy())]
    )
    Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(ant / "nan.tif")
    config = check_data.parse_arguments(["--data-dir", str(root), "-j", "0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = check_data.check_data(config)["splits"]["training"]
    found = {
        kind: sorted(Path(name).name for name in names) for kind, names in split["odd"].items()
    }
    assert found == {
        "rotated": ["turned.png"],
        "transparent": ["clear.png"],
        "deep": ["dark.png", "float.tif", "integer.tif", "outside.tif", "sixteen.png"],
        "outside": ["outside.tif"],
        "dark": ["dark.png"],
        "frames": ["pages.tif"],
    }
    (bad,) = split["unreadable"]
    assert Path(bad["name"]).name == "nan.tif" and bad["reason"] == "no pixel is a finite number"


MODES_OF_PILLOW = ("1", "P", "I", "F", "I;16", "La", "RGBX", "XYZ")


@pytest.mark.parametrize("mode", MODES_OF_PILLOW)
def test_modes_that_are_no_bytes_of_colour_are_refused(mode: str) -> None:
    """Batches hold bytes: 300 of an integer image would be 44 there."""
    with pytest.raises(UserError, match=f"unknown --input-img-mode {mode}: .*8 bits, L, LA, RGB"):
        data.image_mode(1, mode)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "3a", "augmix-m5-w3"])
@pytest.mark.parametrize("mode", data.MODES)
def test_policies_are_refused_for_modes_that_they_do_not_take(policy: str, mode: str) -> None:
    from vitlinear.data.augmentation import check_augmentation
    from vitlinear.train import run

    def check(*flags: str) -> None:
        config = run.parse_arguments(["--dataset", "digits", *flags])
        check_augmentation(config.augmentation, mode)

    if mode in ("L", "RGB"):
        check("--aa", policy)
    else:
        with pytest.raises(UserError, match=f"--aa .* L and RGB, not {mode}"):
            check("--aa", policy)
    check("--aa", policy, "--no-aug")
    check("--color-jitter", "0")
    if mode == "LAB":
        with pytest.raises(UserError, match="--color-jitter .* LAB"):
            check()


@pytest.mark.parametrize("mode", data.MODES)
def test_an_epoch_in_every_mode(mode: str, folder: Path, command: Command, tmp_path: Path) -> None:
    """Without a policy all can be trained in; with one there is a line, and nothing is written."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    flags = ["--input-img-mode", mode, "--in-chans", channels, "--epochs", 1]
    flags += ["--mean", *[0.5] * channels, "--std", *[0.5] * channels]
    flags += ["--color-jitter", 0] if mode == "LAB" else []
    if mode not in ("L", "RGB"):
        refused = command("train", *tiny_flags(folder, tmp_path / "no", *flags, "--aa", "3a"))
        assert refused.code == 2 and refused.err.count("\n") == 1 and "--aa" in refused.err
        assert not (tmp_path / "no").exists()
    result = command("train", *tiny_flags(folder, tmp_path / "run", *flags))
    assert result.code == 0, result.err
    weights = ("--checkpoint", tmp_path / "run" / "last.safetensors")
    assert command("predict", folder / "val", *weights).code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--aa", "foo"), "--aa foo is no policy that timm knows (Unknown AA policy foo)"),
        (("--aa", "rand-x9"), "--aa rand-x9 is no policy that timm knows"),
        (("--aa", "rand-mx.5"), "--aa rand-mx.5 is no policy that timm knows"),
        (("--train-interpolation", "foo"), "unknown --train-interpolation foo: random, bilinear"),
        (("--interpolation", "random"), "unknown --interpolation random: bilinear, bicubic"),
        (("--scale", "1", "0.1"), "--scale 1 0.1: the lower bound comes first"),
    ],
)
def test_policies_that_do_not_exist(
    flags: tuple[str, ...], message: str, folder: Path, command: Command, tmp_path: Path
) -> None:
    result = command("train", *tiny_flags(folder, tmp_path / "run", *flags))
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
