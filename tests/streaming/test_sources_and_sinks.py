"""Images of every kind give the same rows, and maps come out the same in every kind of file."""

import re

import numpy as np
import pytest
import timm
import torch

import vitlinear
from vitlinear.errors import Notice, UserError, pip_install
from vitlinear.streaming import PCA
from vitlinear.streaming import run as running
from vitlinear.streaming.sources import open_source

pytestmark = pytest.mark.usefixtures("all_memory_free")

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 70, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_ravlt_linear").eval()


@pytest.fixture(scope="module")
def features(model):
    return vitlinear.stream(model, PIXELS, output=1)


class Slide:
    """The interface that tiffslide and openslide share, with a transparent corner."""

    level_dimensions = ((70, 300), (35, 150))
    level_downsamples = (1.0, 2.0)

    def read_region(self, location, level, size):
        step = int(self.level_downsamples[level])
        x, y = (n // step for n in location)
        rgb = PIXELS[::step, ::step][y : y + size[1], x : x + size[0]]
        alpha = np.full((*rgb.shape[:2], 1), 255, np.uint8)
        if y == 0:
            alpha[0, 0] = 0
        return np.concatenate((rgb, alpha), -1)


class Raster:
    """The part of rasterio's datasets that is used."""

    count, height, width = 4, 300, 70
    block_shapes = ((128, 70),) * 4

    def read(self, bands, window):
        (top, bottom), (left, right) = window
        return np.stack([PIXELS[top:bottom, left:right, band - 1] for band in bands])


def test_pixels_are_normalised_as_the_model_wants_them(model, features):
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    image = (torch.from_numpy(PIXELS) / 255 - mean) / std
    with torch.no_grad():
        expected = model.forward_intermediates(
            image.permute(2, 0, 1)[None].contiguous(), indices=[1], intermediates_only=True
        )[0]
    assert torch.allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize(
    "source",
    [
        PIXELS.transpose(2, 0, 1),
        torch.from_numpy(PIXELS),
        PIXELS.astype(np.uint16) * 257,
        torch.from_numpy(PIXELS.astype(np.uint16) * 257),
        (PIXELS.astype(np.uint16) * 257).astype(">u2"),
        PIXELS[:, ::-1].copy()[:, ::-1],
        Raster(),
    ],
    ids=[
        "CHW",
        "tensor",
        "uint16",
        "uint16_tensor",
        "big_endian",
        "negative_strides",
        "raster",
    ],
)
def test_kinds_of_images(source, model, features):
    streamed = vitlinear.stream(model, source, output=1, band_rows=7)
    assert torch.allclose(streamed, features, atol=1e-5)


def test_slides(model):
    whole = PIXELS.copy()
    whole[0, 0] = 255  # transparent pixels are white
    expected = vitlinear.stream(model, whole, output=1)
    assert torch.allclose(vitlinear.stream(model, Slide(), output=1, band_rows=7), expected)
    expected = vitlinear.stream(model, whole[::2, ::2], output=1)
    streamed = vitlinear.stream(model, Slide(), output=1, band_rows=7, level=1)
    assert torch.allclose(streamed, expected, atol=1e-5)


def test_rows_that_are_stored_together_are_read_once():
    calls = []

    class Chunked:
        shape, chunks = PIXELS.shape, (100, 70, 3)

        def __getitem__(self, key):
            calls.append((key.start, key.stop))
            return PIXELS[key]

    source = open_source(Chunked(), 3)
    for start in range(0, 300, 20):
        rows = source.read(max(start - 5, 0), min(start + 25, 300))
        assert np.array_equal(rows[0], PIXELS[max(start - 5, 0) : start + 25])
    assert calls == [(0, 100), (100, 200), (200, 300)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 8, 8)), "images of 3 channels"),
        (np.zeros((3, 8, 3)), "could be CHW or HWC"),
        (np.zeros((3, 0, 8)), "no pixel"),
        (np.zeros((3, 8, 8), bool), "holds bool: give pixels"),
        (PIXELS.astype(np.int64), "holds int64: give pixels of uint8 or uint16"),
        (torch.from_numpy(PIXELS).to(torch.int16), "holds int16"),
        (PIXELS.astype(np.complex64), "holds complex64"),
        (np.where(np.arange(70) == 7, np.nan, np.zeros((3, 70, 70))).mT, "row 7 .* not finite"),
        ("nowhere.npy", "no image nowhere.npy"),
        (7, "cannot read an image from int"),
        ("palette.tif", "numbers of a palette"),
    ],
)
def test_sources_that_do_not_fit(source, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(source, str) and source == "palette.tif":
        pytest.importorskip("zarr")
        write_palette(pytest.importorskip("tifffile"), tmp_path / source)
    with pytest.raises(UserError, match=message):
        vitlinear.stream(model, source)


def write_palette(tifffile, path):
    colours = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(path, PIXELS[..., 0], photometric="palette", colormap=colours)


@pytest.mark.parametrize("source", [PIXELS, "image.npy", Raster()], ids=["array", "npy", "raster"])
def test_levels_of_what_has_none(source, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("image.npy", PIXELS)
    with pytest.raises(UserError, match="has no level 1"):
        vitlinear.stream(model, source, level=1)


def test_chunks_of_several_lengths():
    """Those of dask: a length for each."""

    class Chunked:
        shape, chunks = PIXELS.shape, ((100, 200), (70,), (3,))

        def __getitem__(self, key):
            return PIXELS[key]

    source = open_source(Chunked(), 3)
    assert source.row_block == 100 and np.array_equal(source.read(90, 110)[0], PIXELS[90:110])


def test_files_of_unknown_kind(model, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="rows of .png files"):
        vitlinear.stream(model, path)
    (tmp_path / "broken.npy").write_bytes(b"\x93NUM")
    with pytest.raises(UserError, match="cannot read .*broken.npy"):
        vitlinear.stream(model, tmp_path / "broken.npy")


def test_arrays_take_the_map(model, features):
    sink = np.zeros(features.shape[1:], np.float32)
    assert vitlinear.stream(model, PIXELS, sink, output=1) is sink
    assert np.array_equal(sink, features[0])
    with pytest.raises(UserError, match="the array for it"):
        vitlinear.stream(model, PIXELS, sink[:, :-1], output=1)


def test_npy(model, features, tmp_path):
    image, path, workdir = tmp_path / "image.npy", tmp_path / "map.npy", tmp_path / "work"
    np.save(image, PIXELS)
    vitlinear.stream(model, image, {1: path}, output=[1, "logits"], workdir=workdir)
    assert np.array_equal(np.load(path), features[0])
    assert not any(workdir.iterdir())  # nothing to go on from
    with pytest.raises(UserError, match="it exists"):
        vitlinear.stream(model, image, path, output=1)
    vitlinear.stream(model, image, path, output=1, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.npy", "map.npy", "work"]
    link, folder = tmp_path / "link.npy", tmp_path / "folder.npy"
    link.symlink_to(path)
    path.unlink()
    vitlinear.stream(model, image, link, output=1)
    assert link.is_symlink() and np.array_equal(np.load(path), features[0])
    folder.mkdir()
    with pytest.raises(UserError, match="a .npy is a file, and what is there is none"):
        vitlinear.stream(model, image, folder, output=1, overwrite=True)


@pytest.mark.parametrize(
    ("sink", "output", "message"),
    [
        ("map.png", 1, "maps are written as"),
        ("nowhere/map.npy", 1, "its folder does not exist"),
        ("map.npy", "logits", "logits are returned"),
        ({2: "map.npy"}, 1, "no output that was asked for"),
        ({1: "map.npy", 2: "./map.npy"}, [1, 2], "two outputs are to be written to"),
        ("map.npy", [1, 2], "several outputs need a dictionary"),
        (None, [], "no output is asked for"),
        (None, 1.5, "1.5 is no output"),
        (7, 1, "cannot write a map to int"),
    ],
)
def test_sinks_that_do_not_fit(sink, output, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        vitlinear.stream(model, PIXELS, sink, output=output)
    assert not any(tmp_path.iterdir())


def test_no_sink_replaces_the_image(model, tmp_path):
    np.save(tmp_path / "image.npy", PIXELS)
    (tmp_path / "image.zarr").mkdir()
    for source, sink, options, message in (
        ("image.npy", "image.npy", {}, "reads it"),
        (np.load(tmp_path / "image.npy", mmap_mode="r"), "image.npy", {}, "reads it"),
        ("image.zarr", "image.zarr/map.npy", {}, "which holds the image"),
        ("image.npy", "work/map.npy", {"workdir": tmp_path / "work"}, "a later call goes on from"),
    ):
        (tmp_path / "work").mkdir(exist_ok=True)
        source = tmp_path / source if isinstance(source, str) else source
        with pytest.raises(UserError, match=message):
            vitlinear.stream(model, source, tmp_path / sink, output=1, overwrite=True, **options)
    assert np.array_equal(np.load(tmp_path / "image.npy"), PIXELS)


def test_numbers_of_numpy_name_outputs(model, features, tmp_path):
    options = {"output": np.int64(1), "workdir": tmp_path}
    assert torch.equal(vitlinear.stream(model, PIXELS, **options), features)


def test_rows_are_written_as_they_come(model, features, monkeypatch):
    events = []
    whole = running.run_band

    def noted(plan, source, own, *args):
        rows = whole(plan, source, own, *args)
        events.append(own)
        return rows

    class Array:
        shape, chunks = tuple(features.shape[1:]), (48, 12, 9)

        def __setitem__(self, key, rows):
            assert np.allclose(rows, features[0][key], atol=1e-5)
            events.append((key[1].start, key[1].stop))

    monkeypatch.setattr(running, "run_band", noted)
    vitlinear.stream(model, PIXELS, Array(), output=1, band_rows=10)
    # Whole chunks, as soon as they are there, and the rest.
    first, second, third = (0, 12), (12, 24), (24, 36)
    bands = [(0, 10), (10, 20), first, (20, 30), second, (30, 38), third, (36, 38)]
    assert events[-8:] == bands


@pytest.mark.parametrize("name", ["map.npy", "map.zarr", "map.tif"])
def test_nothing_half_written_stays(name, model, tmp_path, monkeypatch):
    pytest.importorskip("zarr")
    pytest.importorskip("tifffile")
    ran = []
    whole = running.run_band

    def fails_late(plan, *args):
        if plan.step.name == "final":
            ran.extend(path.name for path in tmp_path.iterdir())
            raise UserError("late")
        return whole(plan, *args)

    monkeypatch.setattr(running, "run_band", fails_late)
    with pytest.raises(UserError, match="late"):
        vitlinear.stream(model, PIXELS, {0: tmp_path / name}, output=[0, "logits"], band_rows=4)
    assert ran == [f".map.unfinished{name[3:]}"]  # written, under a name of its own
    assert not any(tmp_path.iterdir())


def test_missing_libraries_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(UserError, match=f"needs zarr.*{re.escape(pip_install('wsi'))}"):
        vitlinear.stream(model, PIXELS, tmp_path / "map.zarr", output=1)


def test_zarr(model, features, tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.save(str(tmp_path / "image.zarr"), PIXELS)
    for _ in range(2):
        vitlinear.stream(
            model, tmp_path / "image.zarr", tmp_path / "map.zarr", output=1, overwrite=True
        )
    assert np.array_equal(zarr.open(str(tmp_path / "map.zarr"), mode="r")[:], features[0])


def test_tiff_with_a_pyramid(model, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    pixels = np.random.default_rng(0).integers(0, 256, (900, 2300, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "image.tif", pixels, tile=(256, 256), photometric="rgb")
    expected = vitlinear.stream(model, pixels, output=0)[0]
    vitlinear.stream(model, tmp_path / "image.tif", tmp_path / "map.tif", output=0)
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        levels = file.series[0].levels
        assert [level.shape for level in levels] == [(225, 575, 24), (113, 288, 24)]
        assert np.array_equal(levels[0].asarray(), expected.permute(1, 2, 0))
        mean = levels[0].asarray()[:2, :2].mean((0, 1))
        assert np.allclose(levels[1].asarray()[0, 0], mean, atol=1e-6)


def test_slide_library(model, tmp_path):
    tiffslide = pytest.importorskip("tiffslide")
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "slide.tif", PIXELS, tile=(64, 64), photometric="rgb")
    streamed = vitlinear.stream(model, tiffslide.TiffSlide(tmp_path / "slide.tif"), output=1)
    assert torch.equal(streamed, vitlinear.stream(model, PIXELS, output=1))


def write_scene(path):
    """The image with a place on the earth; returns that, as rasterio's transform."""
    rasterio = pytest.importorskip("rasterio")
    transform = rasterio.transform.from_origin(500000, 4600000, 10, 10)
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": 300, "width": 70}
    profile |= {"crs": "EPSG:32633", "transform": transform}
    with rasterio.open(path, "w", **profile) as file:
        file.write(PIXELS.transpose(2, 0, 1))
    return transform


def test_cog_keeps_its_place_on_the_earth(model, features, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    transform = write_scene(tmp_path / "scene.tif")
    vitlinear.stream(model, tmp_path / "scene.tif", tmp_path / "map.tif", output=1)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.crs == "EPSG:32633"
        assert file.transform == transform * transform.scale(8, 8)
        assert np.array_equal(file.read(), features[0])
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and np.isnan(file.nodata)
    assert {file.name for file in tmp_path.iterdir()} == {"scene.tif", "map.tif"}


def test_levels_keep_their_place_on_the_earth(model, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    transform = write_scene(tmp_path / "scene.tif")
    with rasterio.open(tmp_path / "scene.tif", "r+") as file:
        file.build_overviews([2])
    vitlinear.stream(model, tmp_path / "scene.tif", tmp_path / "map.tif", output=0, level=1)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert (file.height, file.transform) == (38, transform * transform.scale(8, 8))
    with pytest.raises(UserError, match="Cannot open overview level 1"):
        vitlinear.stream(model, tmp_path / "scene.tif", level=2)


def test_a_place_on_the_earth_that_is_lost_is_told(model, features, tmp_path, monkeypatch):
    pytest.importorskip("zarr")
    write_scene(tmp_path / "scene.tif")
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.warns(Notice, match="has a place on the earth, which maps of it will not have"):
        streamed = vitlinear.stream(model, tmp_path / "scene.tif", output=1)
    assert torch.equal(streamed, features)


@pytest.mark.parametrize(
    ("dtype", "missing"), [("float32", np.nan), ("float32", -9999), ("uint8", 0)]
)
def test_missing_data_count_as_the_mean(dtype, missing, model, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    write_scene(tmp_path / "scene.tif")
    whole = PIXELS.clip(1).astype(dtype)
    with rasterio.open(tmp_path / "scene.tif") as scene:
        profile = {**scene.profile, "dtype": dtype, "nodata": missing}
    filled = torch.from_numpy(whole.astype(np.float32))
    if dtype == "uint8":
        mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
        filled = (filled / 255 - mean) / std
    whole[100:200, :40] = missing
    filled[100:200, :40] = 0
    if dtype == "uint8":  # a colour without red
        whole[0, 0, 0] = 0
        filled[0, 0, 0] = -mean[0] / std[0]
    with rasterio.open(tmp_path / "scene.tif", "w", **profile) as file:
        file.write(whole.transpose(2, 0, 1))
    expected = vitlinear.stream(model, filled, output=0)
    streamed = vitlinear.stream(model, tmp_path / "scene.tif", output=0, band_rows=7, mask="valid")
    kept = ~streamed.isnan().any(1)[0]
    assert torch.allclose(streamed[:, :, kept], expected[:, :, kept], atol=1e-4)
    assert not kept[32:48, :8].any() and kept.sum() == kept.numel() - 16 * 8


def test_half_precision_into_a_cog(model, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    write_scene(tmp_path / "scene.tif")
    half = timm.create_model("test_ravlt_linear").half().eval()
    vitlinear.stream(half, tmp_path / "scene.tif", tmp_path / "map.tif", output=0)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.dtypes[0] == "float32" and np.isfinite(file.read()).all()


def test_principal_components_keep_their_place_on_the_earth(model, tmp_path):
    """300 rows are no multiple of 32: the map reaches beyond the image."""
    rasterio = pytest.importorskip("rasterio")
    transform = write_scene(tmp_path / "scene.tif")
    vitlinear.stream(model, tmp_path / "scene.tif", tmp_path / "map.tif", output=PCA("features"))
    with rasterio.open(tmp_path / "map.tif") as file:
        assert (file.height, file.transform) == (10, transform * transform.scale(32, 32))


def test_a_memory_map_that_copies_what_is_written_keeps_it(model, tmp_path):
    np.save(tmp_path / "image.npy", PIXELS.astype(np.float32))
    image = np.load(tmp_path / "image.npy", mmap_mode="c")
    image -= 100
    vitlinear.stream(model, image, output=1, band_rows=2)
    assert np.array_equal(image, PIXELS.astype(np.float32) - 100)


def test_command(command, tmp_path, features, model):
    from safetensors.torch import save_file

    np.save(tmp_path / "image.npy", PIXELS)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    arguments = ("stream", "test_ravlt_linear", tmp_path / "image.npy", "--map", 1)
    arguments += ("--checkpoint", tmp_path / "weights.safetensors", "--output")
    result = command(*arguments, tmp_path / "map.npy")
    assert result.code == 0, result.err
    assert np.array_equal(np.load(tmp_path / "map.npy"), features[0])
    result = command(*arguments, tmp_path / "image.npy")
    assert result.code == 2 and "the command reads it" in result.err
    result = command("stream", "test_ravlt_linear", tmp_path / "image.npy", "--output", "x.npy")
    assert result.code == 2 and "no weights" in result.err
    result = command(*arguments, tmp_path / "other.npy", "--model", "test_mavit")
    assert result.code == 2 and "unknown option --model" in result.err  # MODEL names it
