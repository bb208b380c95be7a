"""Processes that share the bands of an image make what one makes."""

import time
from pathlib import Path

import numpy as np
import pytest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import vitlinear
from tests.as_trained import make
from tests.parallel.ranks import TIMEOUT, Ranks
from tests.streaming.test_exact import difference
from vitlinear.errors import UserError
from vitlinear.streaming import PCA, run

pytestmark = pytest.mark.usefixtures("all_memory_free")

# Sums and softmax, and lines passed on from band to band; at night windows and training as well.
MODELS = ["test_ravlt", "test_lightnet"]
MODELS += [pytest.param(x, marks=pytest.mark.nightly) for x in ("test_pola_swin", "test_vittt")]
IMAGE = np.random.default_rng(0).standard_normal((3, 171, 64))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    ranks = Ranks(3, str(tmp_path_factory.mktemp("group") / "store"))
    yield ranks
    ranks.close()


def mesh():
    return init_device_mesh("cpu", (3,))


def streamed(name: str, folder: Path) -> dict:
    outputs = vitlinear.stream(
        make(name), IMAGE, output=["logits", 1], workdir=folder, mesh=mesh(), band_rows=8
    )
    return {key: x.clone() for key, x in outputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_one_process(name, three, tmp_path):
    expected = vitlinear.stream(make(name), IMAGE, output=["logits", 1])
    for outputs in three.run(streamed, name, tmp_path):
        assert max(difference(outputs[key], expected[key]) for key in expected) < 1e-10


def count_bands(folder: Path) -> int:
    bands = []
    whole = run.run_band

    def counted(*args):
        bands.append(args[2])
        return whole(*args)

    run.run_band = counted
    try:
        sink = folder / "map.npy"
        vitlinear.stream(make("test_ravlt_linear"), IMAGE, sink, output=0, band_rows=4,
                         workdir=folder / "work", mesh=mesh())  # fmt: skip
    finally:
        run.run_band = whole
    return len(bands)


def test_each_runs_some_of_the_bands_and_the_first_writes(three, tmp_path):
    bands = three.run(count_bands, tmp_path)
    expected = vitlinear.stream(make("test_ravlt_linear"), IMAGE, output=0)
    assert max(bands) - min(bands) <= 4 and min(bands) > 10
    assert np.allclose(np.load(tmp_path / "map.npy"), expected[0], atol=1e-10)


def fails_on_one(folder: Path) -> str:
    image = IMAGE
    if distributed.get_rank() == 1:

        class Broken:
            shape = IMAGE.shape

            def __getitem__(self, key):
                if key[1].start > 60 and key[1].stop - key[1].start > 1:
                    raise OSError("bad sector")
                return IMAGE[key]

        image = Broken()
    try:
        vitlinear.stream(
            make("test_ravlt_linear"), image, output=0, workdir=folder, mesh=mesh(), band_rows=4
        )
    except UserError as error:
        return str(error)
    return "no error"


def test_a_process_that_fails_ends_all(three, tmp_path):
    messages = three.run(fails_on_one, tmp_path)
    assert all("bad sector" in message for message in messages)
    assert messages[0].startswith("process 1 failed")


class Full:
    """A sink on a disk that is full."""

    dtype = np.dtype("float32")

    def __init__(self, channels: int) -> None:
        self.shape = (channels, 43, 16)

    def __setitem__(self, key, value):
        raise OSError("disk full")


def fails_to_write(folder: Path, output: object, broken: str) -> tuple[str, float]:
    name = "test_ravlt_linear"
    options = {
        "sink": Full(24 if output == 0 else 3),
        "output": output,
        "workdir": folder,
        "mesh": mesh(),
    }
    if broken == "shape" and distributed.get_rank() == 1:
        options["sink"] = np.zeros((1, 2, 3))
    with pytest.raises(UserError) as caught:
        vitlinear.stream(make(name), IMAGE, **options, band_rows=4)
    began = time.perf_counter()
    distributed.barrier()
    return str(caught.value), time.perf_counter() - began


@pytest.mark.parametrize("output", [0, "pca"])
def test_a_sink_that_fails_ends_all(output, three, tmp_path):
    """None waits for what does not come, in whatever step it is."""
    output = PCA(0) if output == "pca" else output
    first, *others = three.run(fails_to_write, tmp_path, output, "disk")
    assert "disk full" in first[0] and not first[0].startswith("process")
    assert all(x[0].startswith("process 0 failed: cannot write") for x in others)
    assert max(x[1] for x in (first, *others)) < TIMEOUT / 4


def fails_then_goes_on(folder: Path) -> np.ndarray:
    fails_to_write(folder, 0, "disk")
    model = make("test_ravlt_linear")
    sink = np.zeros((24, 43, 16))
    vitlinear.stream(model, IMAGE, sink, output=0, workdir=folder, mesh=mesh(), band_rows=4)
    return sink


def test_a_call_that_failed_in_a_sink_goes_on(three, tmp_path):
    """The others keep the map before until the first process has written."""
    expected = vitlinear.stream(make("test_ravlt_linear"), IMAGE, output=0)[0]
    sinks = three.run(fails_then_goes_on, tmp_path)
    assert np.allclose(sinks[0], expected, atol=1e-10)
    assert not any(tmp_path.iterdir())


def test_bad_input_of_one_ends_all(three, tmp_path):
    messages = [x[0] for x in three.run(fails_to_write, tmp_path, 0, "shape")]
    assert messages[0].startswith("process 1 failed:") and messages[2] == messages[0]
    assert not messages[1].startswith("process")


def without_a_folder() -> None:
    with pytest.raises(UserError, match="need a workdir that all of them see"):
        vitlinear.stream(make("test_ravlt"), IMAGE, mesh=mesh())


def test_a_folder_is_needed(three):
    three.run(without_a_folder)
