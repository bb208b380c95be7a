"""Bands are as high as the memory allows, and no higher."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import vitlinear
from vitlinear.errors import UserError
from vitlinear.streaming import PCA, Head, maps, memory, run, sinks

pytestmark = pytest.mark.usefixtures("all_memory_free")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_ravlt_linear").eval()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((3, 400, 96)).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "number"),
    [("4GiB", 2**32), ("500 MB", 500 * 2**20), ("1.5k", 1536), ("7", 7), (9, 9)],
)
def test_amounts(text, number):
    assert memory.parse_memory(text) == number


@pytest.mark.parametrize("text", ["much", "-3GiB", "4 GiB more", 0, "0"])
def test_no_amounts(text):
    with pytest.raises(UserError, match="memory"):
        memory.parse_memory(text)


def test_peak_is_that_of_living_tensors():
    def steps():
        x = torch.zeros(1000)
        y = x.view(10, 100) + 1  # a view is no memory
        del x
        z = F.conv2d(y[None, None], torch.ones(1, 1, 1, 1))
        return z.sum()

    assert 8000 <= memory.peak_bytes(steps) < 8200


def test_bands_keep_to_the_budget(model, image, monkeypatch):
    budget, peaks, heights = 2 * 2**20, [], []
    monkeypatch.setattr(run, "resident", lambda: -run.RESERVE)
    whole = run.run_band

    def counted(plan, source, own, cuts, sums, example):
        made = []

        def once():
            try:
                made.append(whole(plan, source, own, cuts, sums, example))
            except BaseException as error:
                made.append(error)

        peaks.append(memory.peak_bytes(once))
        if isinstance(made[0], BaseException):
            raise made[0]
        heights.append(own.stop - own.start)
        return made[0]

    expected = vitlinear.stream(model, image)
    # The maps are not counted here: those of this image would not fit.
    monkeypatch.setattr(run.Runner, "check_maps", lambda self, plans, wanted: None)
    monkeypatch.setattr(run.Runner, "nbytes", lambda self, shape: 0)
    monkeypatch.setattr(run, "measured_bytes", _measured_with(whole))
    monkeypatch.setattr(run, "run_band", counted)
    result = vitlinear.stream(model, image, memory=budget)
    assert torch.allclose(result, expected, atol=1e-5)
    assert max(peaks) <= budget
    assert len(set(heights)) > 2  # each step has bands of its own


def _measured_with(run_band):
    """`measured_bytes` that does not go through what counts bands."""

    def measured_bytes(measure, height, width):
        counting, run.run_band = run.run_band, run_band
        try:
            return memory.measured_bytes(measure, height, width)
        finally:
            run.run_band = counting

    return measured_bytes


def test_too_little_memory_is_said(model, image, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "resident", lambda: -run.RESERVE)
    with pytest.raises(UserError, match="maps between layers need .* give workdir="):
        vitlinear.stream(model, image, memory="400KiB")
    with pytest.raises(UserError, match="stem needs .* KiB for its smallest band"):
        vitlinear.stream(model, image, memory="100KiB", workdir=tmp_path)


def test_blocks_that_fill_the_memory_are_named(model, image, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "resident", lambda: -run.RESERVE)

    class Chunked:
        shape, chunks, dtype = image.shape, (3, 300, 96), image.dtype

        def __getitem__(self, key):
            return image[key]

    with pytest.raises(UserError, match="the blocks of 300 rows of the image need .* at once"):
        vitlinear.stream(model, Chunked(), memory="1MiB", workdir=tmp_path)

    class Array:
        shape, chunks = (24, 100, 24), (24, 90, 24)

        def __setitem__(self, key, rows):
            raise AssertionError

    with pytest.raises(UserError, match="the blocks of 90 rows of the map for an array need"):
        vitlinear.stream(model, image, Array(), output=0, memory="1MiB", workdir=tmp_path)
    head = Head(torch.nn.Conv2d(24, 150, 1).eval(), 0)
    with pytest.raises(UserError, match="the head .Conv2d. needs .* for its smallest band"):
        vitlinear.stream(model, image, output=head, memory="20KiB", workdir=tmp_path)


def test_blocks_of_writers_have_the_rows_that_fit():
    shape, array = (1000, 50, 10), np.empty((10, 1000, 50), np.float32)
    row = sinks.COPIES * 50 * 10 * 4
    assert [sinks.block_rows("a.npy", shape, 4, 7 * row), sinks.block_rows(array, shape, 4, 0)] == [
        7,
        1,
    ]
    assert sinks.block_rows("a.npy", shape, 4, 999 * row) == sinks.TILE
    assert sinks.block_rows("a.zarr", shape, 4, 7 * row) == sinks.TILE


@pytest.mark.parametrize("output", [PCA(0), Head(torch.nn.Conv2d(24, 150, 1).eval(), 0)])
def test_outputs_made_of_maps_are_made_in_groups_of_rows(output, model, image, monkeypatch):
    """Of one of these and of a block of the writer, what is read at once keeps to the memory."""
    expected = vitlinear.stream(model, image, output=output)
    groups = []
    read = maps.RowMap.read

    def noted(self, start, stop):
        groups.append(stop - start)
        return read(self, start, stop)

    monkeypatch.setattr(maps.RowMap, "read", noted)
    monkeypatch.setattr(run.Runner, "left", lambda self, made: 400 * 2**10)
    view = vitlinear.stream(model, image, output=output, band_rows=50)
    assert max(groups[-4:]) < 50 and torch.allclose(view.double(), expected.double(), atol=1)


def test_softmax_says_how_much_it_needs_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "resident", lambda: -run.RESERVE)
    monkeypatch.setattr(run.Runner, "make_map", None)
    model = timm.create_model("test_ravlt").eval()
    tall = np.broadcast_to(np.float32(0), (3, 8000, 96))
    with pytest.raises(UserError, match="stages.2.blocks.0 has softmax attention over the whole"):
        vitlinear.stream(model, tall, memory=800 * 2**10, workdir=tmp_path)
