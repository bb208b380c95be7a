"""``vitlinear compare-runs``: on runs made for it, and on real ones."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.commands import Command
from tests.train.helpers import train
from vitlinear.train.compare_curves import curves
from vitlinear.train.record.recorded import Recorded, labels, read_runs


def write_run(
    path: Path, top1: list[float], every: int = 2, more: dict[str, Any] | None = None, **flags: Any
) -> Path:
    """A run folder with a row per epoch of four updates, ten seconds each."""
    path.mkdir(parents=True)
    args = {"model": "ravlt_t", "lr": 0.1, "seed": 1, "output": str(path), **flags}
    (path / "args.yaml").write_text(yaml.safe_dump(args))
    rows = [
        {
            "epoch": number, "updates": 4 * number, "train_loss": 2 / number, "eval_top1": value,
            "images_per_s": 100.0 + number, "peak_memory_gib": number / 4, "seconds": 10.0,
            **(more or {}),
        }
        for number, value in enumerate(top1, 1)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    updates = [
        {"update": update, "epoch": (update - 1) // 4 + 1, "train_loss": 1 / update}
        for update in range(every, 4 * len(top1) + 1, every)
    ]
    (path / "updates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in updates))
    return path


def test_the_table(command: Command, tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", [50.0, 80.0, 70.5])
    second = write_run(tmp_path / "second", [40.0, 60.0], lr=0.2, model_kwargs={"depth": 3})
    table = tmp_path / "table.csv"
    result = command("compare-runs", first, second, "--output", "", "--csv", table)
    assert result.code == 0, result.err
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "run": "first", "epochs": "3", "train_loss": str(2 / 3), "best train_loss": str(2 / 3),
        "best train_loss at": "3", "eval_top1": "70.5", "best eval_top1": "80.0",
        "best eval_top1 at": "2", "images/s": "102.0", "peak GiB": "0.75", "seconds": "30.0",
        "lr": "0.1", "model_kwargs": "",
    }  # fmt: skip
    assert (rows[1]["lr"], rows[1]["model_kwargs"]) == ("0.2", "{'depth': 3}")
    lines = result.out.splitlines()
    assert lines[1].split() == [
        "first", "3", "0.6667", "0.6667", "@3", "70.5", "80", "@2", "102", "0.75", "0:00:30"
    ]  # fmt: skip
    start = lines.index("flags that differ")
    assert [line.split() for line in lines[start + 1 :]] == [
        ["run", "lr", "model_kwargs"], ["first", "0.1", "-"], ["second", "0.2", "{'depth':", "3}"]
    ]  # fmt: skip


def test_groups_have_mean_and_spread(command: Command, tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{model}-{seed}", [value], seed=seed, model=model)
        for model, seed, value in (("a", 1, 50.0), ("a", 2, 54.0), ("b", 1, 70.0))
    ]
    result = command("compare-runs", *runs, "--group-by", "model", "--output", "")
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines()]
    (of_a,) = (line for line in lines if line[:1] == ["model=a"])
    assert of_a == ["model=a", "2", *("2", "±", "0") * 2, *("52", "±", "2.8") * 2]
    (of_b,) = (line for line in lines if line[:1] == ["model=b"])
    assert of_b == ["model=b", "1", "2", "2", "70", "70"]


def read(*paths: Path) -> list[Recorded]:
    return read_runs([str(path) for path in paths])


def test_what_is_drawn(tmp_path: Path) -> None:
    runs = read(
        write_run(tmp_path / "a", [50.0, 60.0, 65.0]), write_run(tmp_path / "b", [52.0, 64.0])
    )
    both = {"both": runs}
    (curve,) = curves(both, "eval_top1", "epoch")
    assert (curve.x, curve.mean, curve.runs) == ([1, 2], [51.0, 62.0], 2)
    assert curve.spread == pytest.approx([2**0.5, 8**0.5])
    (curve,) = curves(both, "eval_top1", "update")  # of epochs: intervals do not tell it
    assert curve.x == [4, 8]
    (curve,) = curves(both, "train_loss", "update")  # of intervals
    assert (curve.x, curve.mean) == ([2, 4, 6, 8], [1 / 2, 1 / 4, 1 / 6, 1 / 8])
    (curve,) = curves({"a": runs[:1]}, "eval_top1", "seconds")
    assert (curve.x, curve.spread) == ([10.0, 20.0, 30.0], [0.0, 0.0, 0.0])


def test_the_plot(command: Command, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), [50.0, 60.0 + seed], seed=seed) for seed in range(3)]
    for name, flags in (
        ("a.png", ()), ("b.png", ("--group-by", "model")), ("c.png", ("--x", "seconds")),
        ("d.png", ("--metric", "eval_top1")), ("e.svg", ("--x", "update")),
    ):  # fmt: skip
        result = command("compare-runs", *runs, "--output", tmp_path / name, *flags)
        assert result.code == 0 and f"curves: {tmp_path / name}" in result.out, result.err
    drawn = [(tmp_path / f"{name}.png").read_bytes() for name in "abcd"]
    assert len(set(drawn)) == 4
    assert Image.open(tmp_path / "a.png").width == 2 * Image.open(tmp_path / "d.png").width
    text = (tmp_path / "e.svg").read_text()
    assert text.startswith("<?xml")


def test_labels_tell_runs_apart() -> None:
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/other"), Path("/y/b/run")]
    assert labels(paths) == ["a/run", "x/b/run", "other", "y/b/run"]


def test_numbers_that_are_missing_are_left_out(command: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [50.0, 60.0], more={"eval_loss": None})
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[0]["eval_loss"], rows[1]["images_per_s"], rows[1]["eval_top1"] = 2.0, None, None
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = command(
        "compare-runs", run, "--metric", "eval_loss", "eval_top1", "--output", tmp_path / "x.png"
    )
    assert result.code == 0, result.err
    assert result.out.splitlines()[1].split()[:8] == ["run", "2", "2", "2", "@1", "50", "50", "@1"]


def test_mistakes(command: Command, tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", [50.0], more={"ema_top1": 51.0})
    plain = write_run(tmp_path / "plain", [50.0], every=3)
    started = write_run(tmp_path / "started", [])
    damaged = write_run(tmp_path / "damaged", [50.0])
    (damaged / "metrics.jsonl").write_text("3\n")
    torn = write_run(tmp_path / "torn", [50.0])
    (torn / "args.yaml").write_text("a: [")
    (tmp_path / "empty").mkdir()
    shifted = write_run(tmp_path / "shifted", [50.0], every=4)
    for flags, message in (
        ([tmp_path / "none"], "none is no run of `vitlinear train`: it does not exist"),
        ([tmp_path / "empty"], "empty is no run of `vitlinear train`: it has no args.yaml"),
        ([good / "args.yaml"], "is no run of `vitlinear train`"),
        ([started], "started has no finished epoch yet"),
        ([damaged], "damaged/metrics.jsonl is damaged in line 1"),
        ([torn], "torn/args.yaml cannot be read"),
        ([good, plain, "--metric", "ema_top1"], "no ema_top1 in plain; in all runs: eval_top1, "),
        ([good, "--metric", "eval_top"], "no eval_top in good; in all runs: ema_top1, eval_top1, "),
        ([good, "--group-by", "modle"], "no run has that flag (did you mean model?)"),
        ([plain, shifted, "--x", "update", "--group-by", "model"], "have no update in common"),
        ([good, "--output", tmp_path / "no" / "x.png"], "its folder does not exist"),
        ([good, "--output", tmp_path / "x.doc"], "must end in .png, .pdf or .svg"),
        ([good, "--csv", tmp_path / "no" / "x.csv"], "its folder does not exist"),
        ([good, "--csv", tmp_path], "it is a folder"),
        ([good, "--output", tmp_path], "it is a folder"),
        ([good, "--csv", good / "summary.csv"], "the command reads it"),
        ([good, "--csv", tmp_path / "x.png"], "--output and --csv are both "),
        ([], "required: RUN"),
    ):  # fmt: skip
        output = [] if "--output" in flags else ["--output", tmp_path / "x.png"]
        result = command("compare-runs", *flags, *output)
        assert result.code == 2 and result.out == "", (flags, result)
        assert message in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "x.png").exists()


def test_real_runs(command: Command, images: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "adamw", tmp_path / "sgd"]
    train(images, runs[0], "--log-interval", 1)
    train(images, runs[1], "--log-interval", 1, "--opt", "sgd")
    for x in ("epoch", "update", "seconds"):
        png = tmp_path / f"{x}.png"
        result = command("compare-runs", *runs, "--x", x, "--output", png)
        assert result.code == 0 and png.read_bytes().startswith(b"\x89PNG"), result.err
    assert "opt" in result.out and "-  " not in result.out.split("flags that differ")[0]
