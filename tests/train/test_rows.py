"""Images split over processes by their rows (--rows): the run is that of one process."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import vitlinear_cli as cli
from tests.train.helpers import fork_ranks, free_port, image_folder, tiny_flags, train
from vitlinear.errors import UserError
from vitlinear.processes import join_processes
from vitlinear.train.record.saved_state import read_state
from vitlinear.train.run import parse_arguments
from vitlinear.train.tasks import check_task

# With batch norms, an average, clipping, and everything that draws: crops, mixing, erasing, paths.
# SGD: a bias before a batch norm has a gradient of rounding errors, which Adam would scale up.
FLAGS = ["--model", "test_ravlt_linear", "--img-size", "64", "-b", "6", "--epochs", "2"]
FLAGS += ["--mixup", "0.8", "--cutmix", "1", "--reprob", "0.3", "--drop-path", "0.2"]
FLAGS += ["--drop", "0.1", "--model-ema", "--model-ema-decay", "0.9", "--clip-grad", "1"]
FLAGS += ["--aa", "rand-m9-mstd0.5-inc1", "--dist-timeout", "300", "--log-interval", "1"]
FLAGS += ["--opt", "momentum", "--lr", "0.05", "--warmup-epochs", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images to train on, seven held out: two batches, and an uneven rest."""
    return image_folder(tmp_path_factory.mktemp("images"), train=4, val=3, size=64)


def runs(calls: list[list[str]], ports: list[int]) -> None:
    """Runs of the command, one after the other, in a process of a group; prints their status."""
    for arguments, port in zip(calls, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        status = cli.main(["train", *arguments, "--device", "cpu"])
        # One write: several processes share the file.
        print(f"status {status}\n", end="", flush=True)


def run_together(count: int, *calls: list[str]) -> str:
    """The output of several runs in a group of processes."""
    ports = [free_port() for _ in calls]
    codes, text = fork_ranks(count, runs, list(calls), ports)
    assert codes == [0] * count, text[-3000:]
    return text


def flags(images: Path, output: Path, *more: object) -> list[str]:
    return tiny_flags(images, output, *FLAGS, *more)


@pytest.mark.process
@pytest.mark.slow
def test_a_run_by_rows_is_that_of_one_process(images: Path, tmp_path: Path) -> None:
    """Weights, average, statistics, losses and metrics; and the same run stopped and resumed."""
    expected, whole, parts = (tmp_path / name for name in ("one", "whole", "parts"))
    train(images, expected, *FLAGS)
    text = run_together(
        2,
        flags(images, whole, "--rows", 2),
        flags(images, parts, "--rows", 2, "--stop-epoch", 1),
        flags(images, parts, "--rows", 2, "--resume", "auto"),
        flags(images, tmp_path / "small", "--rows", 2, "--img-size", 32),
    )
    assert text.count("status 0") == 6 and text.count("status 2") == 2
    assert text.count("images of 32 rows have 1 there: lower --rows") == 2

    one, two, resumed = (read_state(path / "last_state.pt") for path in (expected, whole, parts))
    assert_same_weights(two, one)
    for kind in ("state_dict", "state_dict_ema"):
        for name, value in two[kind].items():
            assert torch.equal(resumed[kind][name], value), name
    assert two["images_per_batch"] == 6 and two["updates"] == one["updates"] == 4
    assert_same_numbers(whole, expected)


def assert_same_weights(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for kind in ("state_dict", "state_dict_ema"):
        for name, value in expected[kind].items():
            torch.testing.assert_close(found[kind][name], value, rtol=1e-5, atol=1e-5, msg=name)


def assert_same_numbers(found: Path, expected: Path) -> None:
    """Losses and metrics of each epoch, which differ from epoch to epoch."""
    ours, theirs = (
        list(csv.DictReader((path / "summary.csv").open())) for path in (found, expected)
    )
    assert len(ours) == len(theirs) == 2
    for mine, wanted in zip(ours, theirs, strict=True):
        names = [name for name in wanted if name.startswith(("train_", "eval_", "ema_"))]
        assert len(names) > 6
        for name in names:
            assert float(mine[name]) == pytest.approx(float(wanted[name]), rel=1e-5), name
    assert ours[0]["train_loss"] != ours[1]["train_loss"]


@pytest.mark.process
@pytest.mark.nightly
def test_groups_share_the_data(images: Path, tmp_path: Path) -> None:
    """Four processes in two groups against two processes, which see the same batches."""
    expected, found = tmp_path / "two", tmp_path / "four"
    run_together(2, flags(images, expected, "-b", 4))
    text = run_together(4, flags(images, found, "-b", 4, "--rows", 2, "--recipe-batch-size", 64))
    assert "x 2 group(s) of 2)" in text
    one, two = (read_state(path / "last_state.pt") for path in (expected, found))
    assert two["images_per_batch"] == one["images_per_batch"] == 8
    assert_same_weights(two, one)
    assert_same_numbers(found, expected)


@pytest.mark.process
@pytest.mark.nightly
def test_with_other_ways_to_train(images: Path, tmp_path: Path) -> None:
    """Recomputing, sharded weights and MESA give the run of one process; autocast one near it."""
    ways = {
        "recomputed": ["--grad-checkpointing"],
        "sharded": ["--fsdp"],
        "mesa": ["--mesa", 1, "--mesa-start-epoch", 0],
        "autocast": ["--amp", "--amp-dtype", "bfloat16"],
    }
    train(images, tmp_path / "plain", *FLAGS)
    train(images, tmp_path / "one-mesa", *FLAGS, *map(str, ways["mesa"]))
    text = run_together(
        2, *[flags(images, tmp_path / way, "--rows", 2, *more) for way, more in ways.items()]
    )
    assert text.count("status 0") == 8, text[-3000:]
    plain, mesa = (read_state(tmp_path / way / "last_state.pt") for way in ("plain", "one-mesa"))
    found = {way: read_state(tmp_path / way / "last_state.pt") for way in ways}
    assert_same_weights(found["recomputed"], plain)
    assert_same_weights(found["sharded"], plain)
    assert_same_weights(found["mesa"], mesa)
    rounded, exact = (
        torch.cat([x.flatten() for x in state["state_dict"].values() if x.is_floating_point()])
        for state in (found["autocast"], plain)
    )
    assert (rounded - exact).norm() < 0.01 * exact.norm()


def test_what_cannot_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="--rows 2 splits each image over 2 processes, .* are 1"):
        join_processes(torch.device("cpu"), timeout=1, rows=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="start a multiple of 2, with torchrun"):
        join_processes(torch.device("cpu"), timeout=1, rows=2)
    config = parse_arguments(["--rows", "2", "--kd-model-name", "deit_tiny_patch16_224"])
    with pytest.raises(UserError, match="not what a teacher was trained on"):
        check_task(config.distillation, averages=False, sharded=False, rows=2)
