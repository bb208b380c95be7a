"""An interrupted call leaves what it had finished, and the same call goes on from there."""

import errno
import os

import numpy as np
import pytest
import timm
import torch

import vitlinear
from vitlinear.errors import UserError
from vitlinear.ops.attention_state import LinearAttentionState
from vitlinear.streaming import PCA, maps
from vitlinear.streaming import run as running
from vitlinear.streaming.peers import moved
from vitlinear.streaming.record import sole_use
from vitlinear.streaming.sums import Pieces

pytestmark = pytest.mark.usefixtures("all_memory_free")


class Stop(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_ravlt").double().eval()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((3, 97, 64))


def count_bands(monkeypatch, stop_after=None):
    """Counts the bands that run; ends the process, so to speak, after some of them."""
    bands = []
    whole = running.run_band

    def counted(*args):
        if stop_after is not None and len(bands) >= stop_after:
            raise Stop
        bands.append(args[2])
        return whole(*args)

    monkeypatch.setattr(running, "run_band", counted)
    return bands


def test_components_of_another_map_are_another_run(model, image, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        count_bands(patched, stop_after=20)
        with pytest.raises(Stop):
            vitlinear.stream(model, image, output=PCA("features"), workdir=tmp_path, band_rows=1)
    with pytest.raises(UserError, match="holds what another call of stream has begun"):
        vitlinear.stream(model, image, output=PCA(0), workdir=tmp_path, band_rows=1)


def test_tensors_move_wherever_they_are_kept():
    """Tensors that were pickled on one GPU are used on another."""
    value = {"a": [torch.ones(2), (None, 3)], "b": Pieces(1, [[torch.ones(1)]]), "c": "text"}
    there = moved(value, "meta")
    assert there["a"][0].is_meta and there["b"].pieces[0][0].is_meta
    assert there["a"][1] == (None, 3) and there["b"].axis == 1 and there["c"] == "text"
    state = LinearAttentionState(torch.ones(2))
    assert type(moved(state, "meta")) is LinearAttentionState


@pytest.mark.parametrize("name", ["test_ravlt", "test_ravlt_linear", "test_inline_deit"])
def test_goes_on_at_the_last_finished_band(name, image, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model(name).double().eval()

    def stream(**kwargs):
        return vitlinear.stream(model, image, output=["logits", 1], band_rows=3, **kwargs)

    with monkeypatch.context() as patch:
        bands = count_bands(patch)
        expected = stream()
        total = len(bands)
    done = 0
    for stop in (1, total // 5, total // 3, 2, total // 4):
        with monkeypatch.context() as patch:
            bands = count_bands(patch, stop)
            with pytest.raises(Stop):
                stream(workdir=tmp_path)
            done += len(bands)
    with monkeypatch.context() as patch:
        bands = count_bands(patch)
        outputs = stream(workdir=tmp_path)
    assert done + len(bands) == total or (name == "test_ravlt" and done + len(bands) < 1.3 * total)
    for key, output in outputs.items():
        assert torch.equal(output, expected[key])


def test_work_directory_of_another_run(model, image, tmp_path):
    vitlinear.stream(model, image, output=1, band_rows=3, workdir=tmp_path)
    with pytest.raises(UserError, match="another call of stream"):
        vitlinear.stream(model, image[:, :96], output=1, band_rows=3, workdir=tmp_path)


def test_record_that_is_no_record(model, image, tmp_path):
    (tmp_path / "stream.pt").write_bytes(b"no record")
    with pytest.raises(UserError, match="cannot read .*stream.pt"):
        vitlinear.stream(model, image, workdir=tmp_path)


def test_a_map_that_is_gone(model, image, tmp_path):
    vitlinear.stream(model, image, output=1, band_rows=3, workdir=tmp_path)
    for path in tmp_path.glob("map-*"):
        path.unlink()
    with pytest.raises(UserError, match=r"map-\d+.bin is not there: delete"):
        vitlinear.stream(model, image, output=1, band_rows=3, workdir=tmp_path)


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("gone", [True, False])
def test_a_map_that_goes_while_it_is_made(tmp_path, owned, gone):
    made = maps.FileMap((2, 3, 4), torch.float32, tmp_path / "map-0.bin", owned=owned)
    made.write(0, torch.ones(1, 2, 3, 4))
    made.path.unlink() if gone else os.truncate(made.path, 5)
    what = "delete .*, and the call begins anew" if owned else "all processes need to see"
    with pytest.raises(UserError, match=f"map-0.bin was deleted or cut short while .*: {what}"):
        made.whole()


def test_a_map_that_is_there_and_cannot_be_mapped(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("unable to mmap: Cannot allocate memory")

    made = maps.FileMap((2, 3, 4), torch.float32, tmp_path / "map-0.bin")
    monkeypatch.setattr(torch, "from_file", full)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        made.whole()


def test_a_work_directory_is_used_by_one_call(model, image, tmp_path):
    pytest.importorskip("fcntl")
    with sole_use(tmp_path), pytest.raises(UserError, match="another call is using"):
        vitlinear.stream(model, image, workdir=tmp_path)
    vitlinear.stream(model, image, workdir=tmp_path)


def test_after_a_crash_of_the_machine_nothing_counts(model, image, tmp_path, monkeypatch):
    expected = vitlinear.stream(model, image, band_rows=3, workdir=tmp_path)
    monkeypatch.setattr("vitlinear.streaming.record._boot", lambda: "another boot")
    bands = count_bands(monkeypatch)
    assert torch.equal(vitlinear.stream(model, image, band_rows=3, workdir=tmp_path), expected)
    assert bands


def test_full_disk(model, image, tmp_path, monkeypatch):
    expected = vitlinear.stream(model, image, band_rows=3)
    write, left = os.pwrite, 5

    def full(file, data, offset):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="No space left on device; what was finished stays"):
            vitlinear.stream(model, image, band_rows=3, workdir=tmp_path)
    bands = count_bands(monkeypatch)
    result = vitlinear.stream(model, image, band_rows=3, workdir=tmp_path)
    assert torch.equal(result, expected)
    assert bands[0][0] > 0  # the first bands of the stem were there


def test_no_room_is_said_before_a_step_begins(model, image, tmp_path, monkeypatch):
    def none(file, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", none)
    with pytest.raises(UserError, match="cannot keep a map of .*iB in"):
        vitlinear.stream(model, image, workdir=tmp_path)


def test_no_room_for_a_file_is_an_error_and_no_signal(model, image, tmp_path, monkeypatch):
    def none(file, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", none)
    with pytest.raises(UserError, match=r"cannot write .*map.npy: .*No space left on device"):
        vitlinear.stream(model, image, tmp_path / "map.npy", output=1)
    assert not any(tmp_path.iterdir())


def test_truncated_and_unreadable_images(model, image):
    class Broken:
        shape = image.shape

        def __getitem__(self, key):
            if key[1].stop > 50:
                raise OSError("bad sector")
            return image[key]

    with pytest.raises(UserError, match=r"cannot read rows \d+ to \d+ of the image: bad sector"):
        vitlinear.stream(model, Broken(), band_rows=3)

    class Short(Broken):
        def __getitem__(self, key):
            return image[:, :50][key]

    with pytest.raises(UserError, match="the image is truncated"):
        vitlinear.stream(model, Short(), band_rows=3)
