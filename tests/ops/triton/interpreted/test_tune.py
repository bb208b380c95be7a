"""`vitlinear tune` and `vitlinear doctor` on a stand-in for a GPU."""

from __future__ import annotations

import io
import json

import pytest
import torch
from tqdm import tqdm

from tests.ops.triton.stand_in import NAME, install, out_of_memory, out_of_resources
from vitlinear import ops
from vitlinear.ops import backend, kernel_cache, measurements, self_check
from vitlinear.ops.terms import Terms
from vitlinear.ops.triton import calls as prepared
from vitlinear.ops.triton import kept, tuning
from vitlinear.tune import calls, measure

# The least that the interpreter runs: every mechanism would take minutes.
TOKENS = 15
MECHANISMS = ("mala", "elu")


@pytest.fixture
def device(request, monkeypatch, tmp_path):
    """A stand-in on which launches take a millisecond, and everything else of PyTorch four."""
    mechanisms = getattr(request, "param", MECHANISMS)
    stand_in = install(monkeypatch, tmp_path)
    stand_in.seconds["eager"] = 4e-3

    def median_ms(run) -> float:
        before, launches = stand_in.clock, len(stand_in.launched)
        run()
        if len(stand_in.launched) == launches:
            stand_in.clock += stand_in.seconds["eager"]
        return 1e3 * (stand_in.clock - before)

    monkeypatch.setattr(measure, "median_ms", median_ms)
    monkeypatch.setattr(measure, "COPIED", 2**10)
    monkeypatch.setattr(calls, "STAGES", ((TOKENS, 2),))
    monkeypatch.setattr(calls, "HEAD_DIM", 8)
    monkeypatch.setattr("vitlinear.tune.command.MECHANISMS", mechanisms)
    of_mechanisms = calls.of_mechanisms
    monkeypatch.setattr(
        calls,
        "of_mechanisms",
        lambda batch, dtype, device, names=mechanisms: of_mechanisms(batch, dtype, device, names),
    )
    yield stand_in
    backend.forget()


# Where what is asked does not depend on the mechanism.
of_one_mechanism = pytest.mark.parametrize("device", [MECHANISMS[:1]], indirect=True, ids=["mala"])
FLAGS = ("--device", "cpu", "--dtype", "float32", "--batch-size", 2, "--no-compiled")
GIVEN = tuple(term == "rotary" for term in Terms._fields)


def work(mechanism: str, training: bool) -> ops.Workload:
    return ops.Workload("cpu", torch.float32, TOKENS, 8, mechanism, 2, 2, None, GIVEN, training)


def choice(mechanism: str = "mala", training: bool = False) -> ops.Choice:
    return ops.choose_backend("auto", work(mechanism, training), may_check=False)


@of_one_mechanism
@pytest.mark.slow
def test_what_is_faster_is_kept(device, command, tmp_path, monkeypatch):
    file, bar = tmp_path / "seeds.json", io.StringIO()

    def shown(*args, **options):
        return tqdm(*args, **{**options, "disable": False, "file": bar, "mininterval": 0})

    monkeypatch.setattr("vitlinear.tune.command.tqdm", shown)
    result = command("tune", *FLAGS, "--export", file)
    assert result.code == 0, result.err
    told = bar.getvalue()
    assert "check: 100%" in told and "mala float32 8 rotary inference]" in told
    assert "time: 100%" in told and "mala float32 8 rotary training, 15 tokens]" in told
    lines = result.out.splitlines()
    assert lines[0] == "checked 2 kinds of call: 2 right"
    assert f"{NAME}, copy" in lines[2]
    assert [line.split()[-1] for line in lines[5:7]] == ["triton"] * 2
    assert "mala       2 x 15 x 2 x 8  rotary  inference  1.000" in lines[5]
    # 4 tensors of 60 tokens of 32 bytes in a millisecond; 2 x 1024 bytes are copied in four
    assert "1500%" in lines[5].split()
    # by a state and a read: a launch each, and two more in backward
    assert "2.000" in lines[5].split() and "4.000" in lines[6].split()
    assert {"state_kernel", "read_kernel", "query_kernel", "key_kernel"} <= set(device.launched)
    assert choice() == (
        "triton",
        "auto: 4 times the speed of eager at 2 x 15 x 2, measured here",
    )
    # what was written can ship
    content = json.loads(file.read_text())
    assert content["gpu"]["name"] == NAME and len(content["rows"]) == 2
    assert measurements.Measurement.of(content["rows"][0]).speedup(False) == pytest.approx(4)
    # a second run replaces
    device.seconds["forward_kernel"] = 8e-3
    monkeypatch.setattr(self_check, "failure", lambda kind: None)
    assert command("tune", *FLAGS).code == 0
    assert len(kernel_cache.known(device.gpu).rows) == 2
    assert choice() == (
        "eager",
        "auto: 0.5 times the speed of eager at 2 x 15 x 2, measured here",
    )


@of_one_mechanism
def test_compiled_programs_follow_a_time_of_their_own(device, command, monkeypatch):
    """Between eager and compiled formula, the kernels are taken in the place of the former."""
    monkeypatch.setattr(self_check, "failure", lambda kind: None)
    device.seconds.update(forward_kernel=3e-3, backward_kernel=0.5e-3)

    def compiled(function, dynamic):
        assert not dynamic

        def run(*args):
            device.launched.append("compiled")
            device.clock += 2e-3
            return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    result = command("tune", *FLAGS[:-1])
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines() if line.startswith("mala")]
    assert [line[-3:] for line in lines] == [["4.000", "2.000", "triton"]] * 2
    kept_rows = kernel_cache.known(device.gpu).rows
    assert [row.compiled_ms for row in kept_rows] == pytest.approx([2.0] * 2)
    for training in (False, True):
        found = choice(training=training)
        assert found.backend == "triton" and "the speed of eager" in found.reason
        call = work("mala", training)
        rule = backend._decide(call.kind, compiling=True)
        assert rule.choice(call.tokens).backend == "eager"


@of_one_mechanism
@pytest.mark.slow
def test_block_sizes_are_found_kept_and_shipped(device, command, monkeypatch, tmp_path):
    """By other processes of this user, and by others who have the file of `--export`."""
    monkeypatch.setattr(self_check, "failure", lambda kind: None)
    monkeypatch.setattr(tuning, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(kept, "asked_for", None)
    blocks = []
    launch = device.launch

    def noted(executor, run, args, kwargs):
        if executor.fn.__name__ == "forward_kernel":
            blocks.append(kwargs["plan"].block_tokens)
        launch(executor, run, args, kwargs)

    monkeypatch.setattr(device, "launch", noted)

    def timed(run, **_):
        run()
        return 1.0 if blocks[-1:] == [16] else 2.0  # neither the first nor the largest

    monkeypatch.setattr(tuning, "do_bench", timed)

    def in_another_process(asked_for=None):
        """The block of tokens that a call takes there."""
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(prepared, "_prepared", {})
        monkeypatch.setattr(kept, "asked_for", asked_for)
        backend.forget()
        blocks.clear()
        q = torch.randn(2, TOKENS, 2, 8)
        rotary = ops.rotary_tables(3, 5, 8)
        with torch.no_grad():
            ops.linear_attention(q, q, q, mechanism="mala", rotary=rotary, backend="triton")
        (block,) = blocks
        return block

    assert in_another_process() == 32
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(prepared, "_prepared", {})
    folder = tmp_path / "seeds"
    folder.mkdir()
    result = command("tune", *FLAGS, "--export", folder / "one.json")
    assert result.code == 0, result.err
    assert {16, 32, 64} == set(blocks)
    assert in_another_process() == 16 and in_another_process("0") == 32
    # Of another user, without and with the file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert in_another_process() == 32
    for place in (measurements.SEEDS, folder):
        monkeypatch.setattr(measurements, "SEEDS", place)
        measurements.seeds.cache_clear()
        for path in place.glob("*.json"):
            assert measurements.seeds(json.loads(path.read_text())["gpu"]["name"]).rows
    assert in_another_process() == 16 and f"shipped for {NAME}" in choice().reason
    measurements.seeds.cache_clear()


def test_wrong_kernels_are_not_timed(device, command):
    device.wrong.add(ops.get_mechanism("mala").read_out)
    result = command("tune", *FLAGS)
    assert result.code == 0 and not result.err
    assert "checked 4 kinds of call: 2 right" in result.out
    assert "  mala float32 8 rotary training: error of the output 1.0e-02" in result.out
    rows = [line for line in result.out.splitlines() if line.startswith("mala")]
    assert len(rows) == 2 and all("failed its check" in row for row in rows)
    assert choice().backend == "eager" and choice("elu").backend == "triton"
    assert {row.mechanism for row in kernel_cache.known(device.gpu).rows} == {"elu"}
    told = command("doctor", "--device", "cpu").out
    assert "kinds of call: 2 passed their check, 2 failed" in told
    assert "failed: mala float32 8 rotary inference: error of the output" in told


@of_one_mechanism
@pytest.mark.parametrize(
    "error, said", [(out_of_memory(), "out of memory"), (out_of_resources(), "OutOfResources")]
)
def test_what_does_not_fit_has_no_row(device, command, monkeypatch, error, said):
    """The check is small; the calls are not."""
    monkeypatch.setattr(self_check, "failure", lambda kind: None)
    device.failing["forward_kernel"] = error
    result = command("tune", *FLAGS)
    assert result.code == 0
    assert result.out.count(said) == 2 and not kernel_cache.known(device.gpu).rows


@pytest.mark.slow
def test_a_model_is_timed_at_its_own_shapes(device, command, monkeypatch):
    monkeypatch.setattr(self_check, "failure", lambda kind: None)
    result = command("tune", "test_mavit", "--sizes", 16, 32, *FLAGS)
    assert result.code == 0, result.err
    rows = [line.split("  ") for line in result.out.splitlines() if line.startswith("mala")]
    assert {row[0] for row in rows} == {"mala"} and len(rows) >= 4
    found = kernel_cache.known(device.gpu).rows
    assert {row.terms for row in found} == {("rotary", "lepe", "gate")}
    assert {row.batch for row in found} == {2, 1}, "four times the pixels"
    told = command("doctor", "test_mavit", "--size", 16, "--batch-size", 2, "--device", "cpu").out
    assert "2 calls" not in told and "measured here" in told


@pytest.mark.nightly
def test_a_model_of_states_is_timed_as_attention(device, command, monkeypatch):
    monkeypatch.setattr(self_check, "failure", lambda kind: None)
    result = command("tune", "test_vittt", "--sizes", 32, *FLAGS)
    assert result.code == 0, result.err
    rows = kernel_cache.known(device.gpu).rows
    assert {row.mechanism for row in rows} == {"identity"}
    told = command("doctor", "test_vittt", "--size", 32, "--batch-size", 2, "--device", "cpu").out
    assert "measured here" in told


def test_doctor(device, command):
    told = command("doctor", "--device", "cpu").out
    assert "takes the kernels where they are faster: 0 calls measured here, 0 shipped" in told
    assert "from 64 tokens of all heads and samples on, in training from 32" in told
    assert "(not there yet)" in told and "kinds of call: 0 passed" in told


def test_old_devices_are_refused(device, command):
    device.gpu = device.gpu._replace(capability=(7, 5), name="Old")
    result = command("tune", *FLAGS)
    assert result.code == 2
    assert result.err == (
        "error: the kernels cannot run here: they need compute capability 8.0, and Old has 7.5\n"
    )
    assert "takes eager: they need compute capability" in command("doctor", "--device", "cpu").out
