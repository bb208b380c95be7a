"""The commands tune and doctor where there is no GPU; interpreted/test_tune.py has one."""

import pickle

import pytest
import torch

from vitlinear.ops import Workload, backend, measurements
from vitlinear.tune import calls, measure
from vitlinear.tune import command as tune

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    "flags, says",
    [
        (("ravlt_x",), "model 'ravlt_x' is unknown (did you mean ravlt_t"),
        (("--dtype", "half"), "invalid choice: 'half'"),
        (("--sizes", "0"), "must be at least 1"),
        (("--export", "nowhere/rows.json"), "its folder does not exist"),
        (("--device", "warp"), "--device warp cannot be used here"),
        (("test_ravlt", "extra"), "more arguments"),
    ],
)
def test_mistakes(command, flags, says):
    result = command("tune", *flags)
    assert result.code == 2 and says in result.err and result.err.count("\n") == 1


@without_gpu
def test_tune_needs_a_gpu(command):
    result = command("tune", "test_ravlt")
    assert result.code == 2 and result.err.startswith("error: --device cuda cannot be used here")
    result = command("tune", "--device", "cpu")
    assert result.code == 2 and "the kernels run on GPUs alone" in result.err


@without_gpu
@pytest.mark.quick
def test_doctor_without_a_gpu(command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = command("doctor", "test_ravlt", "--size", 64)
    assert result.code == 0, result.err
    for said in (
        f"torch {torch.__version__.split('+')[0]}",
        "no GPU: torch sees none",
        "triton: cannot run on cpu: ",
        "takes eager on cpu: kernels need a GPU",
        f"XDG_CACHE_HOME={tmp_path}",
        f"{tmp_path / 'vitlinear' / 'kernels'}: 0 files",
        "1 x 256 x 1 x 24",
    ):
        assert said in result.out, said
    monkeypatch.setattr("vitlinear.ops.backend._from_environment", "library")
    assert "takes library: set by VITLINEAR_BACKEND" in command("doctor").out
    assert "'test_vit' is a model of timm" in command("doctor", "test_vit").err


@without_gpu
def test_doctor_finds_a_variable_that_nobody_knows(command, monkeypatch):
    monkeypatch.setattr("vitlinear.ops.backend._check_from_environment", "foo")
    assert "cannot decide" not in command("doctor").out, "nothing asks for it without a GPU"
    assert command("doctor", "test_ravlt", "--size", 64).code == 0
    monkeypatch.setattr("vitlinear.ops.backend._from_environment", "foo")
    result = command("doctor")
    assert result.code == 0, result.err
    assert "cannot decide: unknown VITLINEAR_BACKEND value 'foo'; choose from: " in result.out
    result = command("doctor", "test_ravlt", "--size", 64)
    assert result.code == 2
    assert result.err.startswith("error: unknown VITLINEAR_BACKEND value 'foo'")
    with pytest.raises(backend.VariableError) as caught:
        backend.requested_backend()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_gpu_that_is_timed_is_the_one_that_was_asked_for(monkeypatch):
    """Triton's timing records its events on the current device."""
    used = []

    class Enough(Exception):
        pass

    def works(config, dtype, device):
        assert used == [device]
        raise Enough

    monkeypatch.setattr(tune, "choose_device", torch.device)
    monkeypatch.setattr(tune, "_describe", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(tune, "_works", works)
    with pytest.raises(Enough):
        tune.main(["--device", "cuda:1"])


def test_bytes_of_a_call():
    """As the rows of the benchmark count them: 4 and 7 tensors, with an epilogue 6 and 11."""
    given = (False,) * 5
    work = Workload("cuda", torch.bfloat16, 100, 64, "mala", 2, 3, None, given)
    tensor = 2 * 100 * 3 * 64 * 2
    rala, epilogue = work._replace(mechanism="rala"), (False, False, False, True, True)
    assert measure.least_bytes(work) == 4 * tensor
    assert measure.least_bytes(work._replace(training=True)) == 11 * tensor
    assert measure.least_bytes(rala) == 5 * tensor
    assert measure.least_bytes(rala._replace(training=True)) == 13 * tensor
    assert measure.least_bytes(work._replace(given=epilogue)) == 6 * tensor
    assert measure.least_bytes(work._replace(given=epilogue, training=True)) == 17 * tensor


def test_images_of_larger_sizes_are_fewer():
    assert [calls.batch_at(64, size, (224, 1024)) for size in (224, 1024, 4096)] == [64, 3, 1]


def test_rows_that_are_no_measurements():
    with pytest.raises(ValueError, match="not a measurement: .*unexpected keyword"):
        measurements.Measurement.of({"terms": [], "speed": 1})
