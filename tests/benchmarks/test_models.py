"""The benchmark of whole models: a tiny run of the tool, its measures, and rows that fail."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from benchmarks import models, models_report, subject
from benchmarks.subject import Case, Subject
from vitlinear.benchmark import report, turns
from vitlinear.benchmark.turns import FailedError, Process
from vitlinear.cards.count import count
from vitlinear_cli import run

pytestmark = pytest.mark.usefixtures("fork_server")

PNG = b"\x89PNG\r\n\x1a\n"
CASE = Case("test_linear_deit", "eager", "forward", 32, 32, 2)
QUICK = ("--rounds", "2", "--seconds", "0.001", "--threads", "1", "--malloc", "default", "-b", "2")


@pytest.mark.process
@pytest.mark.quick
def test_tool(tmp_path, capsys):
    output, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    flags = ["test_linear_deit", "test_vit", "--sizes", "32", "48x64", "--modes", "eager", "fused"]
    assert run(models.main, [*flags, *QUICK, "--output", str(output), "--plot", str(picture)]) == 0
    record = json.loads(output.read_text())
    assert record["reference"] == "test_linear_deit" and "1 threads" in record["machine"]
    assert record["command"].startswith("python tools/benchmark_models.py test_linear_deit")
    assert {"commit", "torch", "timm"} <= set(record)
    rows = record["rows"]
    assert [(r["height"], r["width"], r["mode"], r["model"]) for r in rows] == [
        (*size, mode, model)
        for size in ((32, 32), (48, 64))
        for mode in ("eager", "fused")
        for model in ("test_linear_deit", "test_vit")
    ]
    for row in rows:
        assert len(row["round_ms"]) == 2 <= row["calls"]
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["images_per_s"] == pytest.approx(2e3 / row["p50_ms"])
        assert row["memory_MiB"] >= 0 and row["resting_MiB"] > 10
        assert row["gmacs"] > 1e-3
        assert (row["mode"] == "fused" or row["difference"] == 0) and row["difference"] < 1e-3
    out = capsys.readouterr().out
    assert out.count("\n| test_") == len(rows)
    assert out.count("pixels^") == 4 and "32x32 to 48x64" in out
    assert out.count("each in its best mode, over test_linear_deit") == 2
    assert picture.read_bytes().startswith(PNG)

    picture.unlink()
    assert run(models.main, ["--report", str(output), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out == out and picture.read_bytes().startswith(PNG)
    assert sorted(tmp_path.iterdir()) == [output, picture]


def test_a_row_that_fails_says_so(tmp_path, capsys):
    """More images than there are addresses; the other batch size is measured all the same."""
    flags = ["test_linear_deit", "--sizes", "32", *QUICK, str(10**13)]
    assert run(models.main, flags) == 0
    out = capsys.readouterr().out
    good, bad = (line for line in out.splitlines() if line.startswith("| test_"))
    assert "out of memory" not in good and good.count("|") == bad.count("|")
    assert "out of memory" in bad


def test_nothing_measured(capsys):
    assert run(models.main, ["test_linear_deit", "--sizes", "32", *QUICK[:-1], str(10**13)]) == 2
    out, err = capsys.readouterr()
    assert "out of memory" in out and err.endswith(
        "nothing could be measured; the table says why\n"
    )


def test_a_process_that_is_killed_or_silent():
    process = Process(subject.serve, CASE, timeout=600)
    assert process.answer()["parameters"] > 0
    assert len(process.ask(1e-9)) == 1
    os.kill(process.process.pid, signal.SIGKILL)
    process.process.join()
    with pytest.raises(FailedError, match="killed by signal 9: out of memory, perhaps"):
        process.ask(1e-9)
    process.close()
    process = Process(subject.serve, CASE, timeout=0)
    with pytest.raises(FailedError, match=r"gave up after 0 s \(--timeout\)"):
        process.answer()
    process.close()
    process = Process(subject.serve, CASE, timeout=600)
    with pytest.raises(FailedError, match=r"gave up after 0 s \(no time left\)"):
        process.answer(deadline=0)
    process.process.join()
    assert process.process.exitcode == -signal.SIGKILL
    process.close()


@pytest.mark.parametrize(
    ("mode", "task", "precision"),
    [
        ("exported", "forward", "float32"),
        ("fused", "forward", "bfloat16"),
        ("fused", "forward", "amp_bfloat16"),
        ("eager", "train", "amp_bfloat16"),
    ],
)
def test_modes(mode, task, precision):
    case = Case("test_ravlt", mode, task, 64, 32, 2, "cpu", precision, channels_last=True)
    found = Subject(case)
    assert found.images.is_contiguous(memory_format=torch.channels_last)
    assert found.images.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
    assert found.facts["memory_MiB"] >= 0
    assert len(found.round(0.01)) >= 1
    if task == "forward" and mode != "eager":
        assert 0 < found.facts["difference"] < 0.1


def test_the_first_call_of_a_turn_does_not_count(monkeypatch):
    """Also where it alone takes the whole time."""
    found = Subject(Case("test_ravlt", "eager", "forward", 64, 32, 2))
    calls = iter([9.0, 3.0, 1.0, 1.5, 1.0])
    monkeypatch.setattr(found, "timed", lambda: next(calls))
    assert found.round(2.0) == [3.0]
    assert found.round(0.5) == [1.5]


def test_the_transcription_has_the_multiply_adds_of_the_model():
    """And both those that fvcore finds in a traced program."""
    size = (3, 64, 64)
    model, theirs = (subject.build(f"test_mavit{end}", size) for end in ("", "@transcription"))
    cost = count(model, size)
    assert subject.multiply_adds(model, size) == cost.projections + cost.attention
    assert subject.multiply_adds(theirs, size) == cost.projections + cost.attention


@pytest.mark.compile
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.nightly  # Inductor's own time
def test_compiled():
    found = Subject(Case("test_linear_deit", "compiled", "forward", 32, 32, 2))
    assert len(found.round(0.01)) >= 1
    torch.compiler.reset()


def test_a_backend_by_name():
    plain, library = (
        Subject(Case(f"test_ravlt{end}", "eager", "forward", 64, 32, 2)) for end in ("", "@library")
    )
    assert (
        subject.build("test_ravlt@library", (3, 64, 32)).stages[0].blocks[0].attn.backend
        == "library"
    )
    assert plain.facts["gmacs"] == library.facts["gmacs"]


def test_what_there_is_no_time_for_says_so(monkeypatch):
    """Two prepare at once; those after the deadline do not, and nor does a second round begin."""
    clock = [0.0]

    class Instant:
        def __init__(self, serve, case, timeout):
            clock[0] += 1

        def answer(self, deadline):
            clock[0] += 10
            return {"parameters": 1}

        def ask(self, seconds):
            clock[0] += 1
            return [0.5]

        def close(self):
            pass

    monkeypatch.setattr(turns, "Process", Instant)
    monkeypatch.setattr(turns.time, "monotonic", lambda: clock[0])
    rows = turns.measure(subject.serve, [CASE] * 5, 9, 1.0, 600, at_once=2, deadline=20.0)
    assert [row.get("calls") for row in rows] == [1, 1, None, None, None]
    assert [row.get("error") for row in rows[2:]] == ["skipped: no time left"] * 3
    clock[0] = 0.0
    rows = turns.measure(subject.serve, [CASE] * 3, 9, 1.0, 600, at_once=2, deadline=40.0)
    assert [row["calls"] for row in rows] == [3, 3, 3]


@pytest.mark.parametrize(
    ("needs", "ran"),
    [((6, 0.5, 0.5), 3), ((0.5, 0.5, 6), 3), ((6, 6, 6), 2), ((9, 1, 1), 1)],
)
def test_rows_that_memory_has_no_room_for(needs, ran, monkeypatch):
    """Room is asked for as large as the largest so far, whatever the order."""
    free = [14.0]
    left = list(needs)

    class Taking:
        def __init__(self, *args):
            free[0] -= left.pop(0)

        def answer(self, deadline):
            return {}

        def ask(self, seconds):
            return [seconds]

        def close(self):
            pass

    monkeypatch.setattr(turns, "Process", Taking)
    monkeypatch.setattr(turns, "available_memory", lambda: free[0])
    rows = turns.measure(subject.serve, [CASE] * 3, 1, 1.0, 600)
    assert ["error" in row for row in rows] == [False] * ran + [True] * (3 - ran)


def test_outputs_that_differ_are_refused(monkeypatch):
    def broken(model, mode, images):
        model.head.bias.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(subject, "prepared", broken)
    with pytest.raises(ArithmeticError, match="outputs differ"):
        Subject(CASE)


def test_memory_is_that_of_a_call():
    """64 MiB that a call takes and gives back, beside 32 that are there before and after."""
    kept = torch.ones(32 * 2**18)
    found = subject.measure_memory(lambda: torch.ones(64 * 2**18).norm(), torch.device("cpu"))
    assert found["tensors_MiB"] == pytest.approx(64, abs=0.01)
    if found["memory_MiB"] is None:
        pytest.skip("this system does not count resident memory")
    assert found["memory_MiB"] == pytest.approx(64, abs=4)
    assert found["resting_MiB"] > kept.nbytes / 2**20


@pytest.mark.quick
def test_exponents_and_ratios():
    pixels = [side**2 for side in (512, 724, 1024, 2048)]
    assert report.exponent(pixels, [3e-5 * n**1.3 for n in pixels]) == pytest.approx(1.3)
    row = {"mode": "eager", "task": "forward", "height": 8, "width": 8, "batch": 1}
    row |= {"memory_MiB": None, "tensors_MiB": 1.0, "calls": 3, "gmacs": 2.0}
    slow = {**row, "model": "a", "round_ms": [20.0, 200.0, 22.0]}
    fast = {**row, "model": "b", "round_ms": [10.0, 100.0, 1000.0]}
    for each in (slow, fast):
        p50, p99 = np.percentile(each["round_ms"], (50, 99))
        each |= {"p50_ms": p50, "p90_ms": p99, "p99_ms": p99, "images_per_s": 1e3 / p50}
    # What slowed both in the second round, and one in the third, leaves the ratio alone.
    assert models_report.ratio(fast, slow) == 2.0
    failed = {**row, "model": "c", "error": "no | way"}
    lines = models_report.table([slow, fast, failed], "a")
    assert "| 2.00 |" in lines[3] and lines[3].endswith("| 2 | 5 | 20 |")
    assert "no / way" in lines[4]
    assert len({line.count("|") for line in lines}) == 1
    assert models_report.table([fast, {**failed, "model": "a"}], "a")[2].split("|")[7] == "  "


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], ["no model"]),
        (["ravlt_x"], ["unknown model 'ravlt_x'", "did you mean ravlt_"]),
        (["ravlt_x@transcription"], ["unknown model 'ravlt_x'"]),
        (["test_vit@transcription"], ["only ravlt_*, mavit_*, mila_*, "]),
        (["ravlt_t@tritan"], ["unknown backend of ravlt_t 'tritan'", "eager, library, triton"]),
        (["test_vit@library"], ["test_vit@library: only models of this package"]),
        (["test_vit", "--output", "/tmp"], ["cannot write /tmp: it is a folder"]),
        (["ravlt_x@triton"], ["unknown model 'ravlt_x'"]),
        (["test_vit", "--modes", "compild"], ["unknown mode 'compild'", "compiled"]),
        (["test_vit", "--modes", "zzz"], ["unknown mode 'zzz'", "eager, fused"]),
        (["test_vit", "--sizes", "0"], ["--sizes: '0'", "HEIGHTxWIDTH"]),
        (["test_vit", "--sizes", "8x8x8"], ["--sizes: '8x8x8'"]),
        (["test_vit", "-b", "0"], ["--batch-sizes"]),
        (["test_vit", "--rounds", "0"], ["--rounds"]),
        (["test_vit", "--passes", "backward"], ["--passes", "backward"]),
        (["test_vit", "--passes", "train", "--modes", "fused"], ["no training step in fused"]),
        (["test_vit", "--reference", "test_vi"], ["--reference test_vi", "did you mean test_vit"]),
        (["test_vit", "--device", "warp"], ["--device warp cannot be used here"]),
        (["test_vit", "--output", "/nowhere/rows.json"], ["cannot write /nowhere/rows", "folder"]),
        (["--report", "/nowhere/rows.json"], ["--report /nowhere/rows.json"]),
        (["test_vit", "--mode", "eager"], ["unknown option --mode", "--modes"]),
    ],
)
def test_mistakes(capsys, flags, says):
    assert run(models.main, flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    for part in says:
        assert part in err
