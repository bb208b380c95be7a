"""Files, TensorBoard and wandb: every row once, whatever was killed and resumed in between."""

import csv
import errno
import io
import json
import multiprocessing
import os
import signal
import struct
import sys
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from vitlinear.errors import UserError
from vitlinear.train.record import curves, trackers
from vitlinear.train.record.logger import FileLogger, Logger, Loggers, read_rows

NAN = float("nan")


def log_run(logger: Logger, epoch: int, update: int, end: int, per_epoch: int = 4) -> None:
    """Logs from a resumed position to the end of epoch ``end``, a row for each second update."""
    logger.keep_before(epoch, update)
    for current in range(epoch + 1, end + 1):
        last = current * per_epoch
        for number in range(max(update, last - per_epoch) + 1, last + 1):
            if number % 2 == 0:
                logger.log_update(number, {"epoch": current, "train_loss": 2.0**-number})
        logger.log_epoch({"epoch": current, "updates": last, "eval_top1": float(last)})
    logger.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def test_rows_come_back(tmp_path: Path) -> None:
    log_run(FileLogger(tmp_path), 0, 0, 2)
    assert read_rows(tmp_path / "updates.jsonl", "update") == [
        {"update": number, "epoch": epoch, "train_loss": 2.0**-number}
        for number, epoch in ((2, 1), (4, 1), (6, 2), (8, 2))
    ]
    rows = [{"epoch": n, "updates": 4 * n, "eval_top1": 4.0 * n} for n in (1, 2)]
    assert read_rows(tmp_path / "metrics.jsonl", "epoch") == rows
    with open(tmp_path / "summary.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in table] == rows


@pytest.mark.parametrize(("epoch", "update"), [(0, 0), (0, 3), (1, 4), (1, 6), (1, 8), (2, 9)])
def test_resuming_leaves_the_files_of_an_uninterrupted_run(
    tmp_path: Path, epoch: int, update: int
) -> None:
    """From before a row, from on one, and from after an epoch whose row is logged already."""
    for name in "ab":
        (tmp_path / name).mkdir()
        log_run(FileLogger(tmp_path / name), 0, 0, 3)
    log_run(FileLogger(tmp_path / "b"), epoch, update, 3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_rows_of_done_epochs_stay_where_updates_become_fewer(tmp_path: Path) -> None:
    """Two epochs of 4 updates are 4 of the same epochs' images in batches twice as large."""
    log_run(FileLogger(tmp_path), 0, 0, 3)
    log_run(FileLogger(tmp_path), 2, 4, 3, per_epoch=2)
    rows = read_rows(tmp_path / "updates.jsonl", "update")
    assert [(row["update"], row["epoch"]) for row in rows] == [
        (2, 1),
        (4, 1),
        (6, 2),
        (8, 2),
        (6, 3),
    ]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_row_is_cut_off(tmp_path: Path, cut: int) -> None:
    log_run(FileLogger(tmp_path), 0, 0, 2)
    whole, updates = contents(tmp_path), tmp_path / "updates.jsonl"
    lines = updates.read_bytes().splitlines(keepends=True)
    updates.write_bytes(b"".join(lines[:3]) + lines[3][:-1][:cut] + b"\0" * (cut % 3))
    assert len(read_rows(updates, "update")) == 3
    log_run(FileLogger(tmp_path), 1, 6, 2)
    assert contents(tmp_path) == whole


def test_damage_is_not_taken_for_a_kill(tmp_path: Path) -> None:
    log_run(FileLogger(tmp_path), 0, 0, 2)
    for name, text in (("updates.jsonl", '{"up\n{}\n'), ("metrics.jsonl", '[1]\n{"epoch": 2}\n')):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} is damaged in line 1"):
            FileLogger(tmp_path).keep_before(1, 4)
        assert (tmp_path / name).read_text() == text
        (tmp_path / name).write_bytes(before)


def test_columns_that_come_later_and_numbers_that_json_lacks(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path)
    logger.log_epoch({"epoch": 1, "eval_loss": NAN})
    logger.log_epoch({"epoch": 2, "eval_loss": 1.5, "ema_loss": float("inf")})
    logger.log_update(1, {"train_loss": NAN})
    assert (tmp_path / "summary.csv").read_text() == "epoch,eval_loss,ema_loss\n1,,\n2,1.5,\n"
    strict = json.JSONDecoder(parse_constant=lambda name: pytest.fail(name))
    for name in ("metrics.jsonl", "updates.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            strict.decode(line)
    assert read_rows(tmp_path / "updates.jsonl", "update") == [{"update": 1, "train_loss": None}]


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = FileLogger(tmp_path)
    logger.log_update(1, {"train_loss": 1.0})
    before = contents(tmp_path)

    def full(_: int) -> None:  # the row is written, and the disk says afterwards that it is not
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot write .*updates.jsonl: No space left"):
            logger.log_update(2, {"train_loss": 1.0})
        with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No space left"):
            logger.log_epoch({"epoch": 1})
    assert contents(tmp_path) == before


def log_until_killed(folder: Path, going: Event) -> None:
    """Runs in a process of its own."""
    logger = FileLogger(folder)
    logger.keep_before(0, 0)
    for update in range(1, 10**6):
        logger.log_update(update, {"train_loss": 1 / update})
        if update == 20:
            going.set()


@pytest.mark.process
def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL somewhere in a stream of rows; what is there can be read and gone on with."""
    context = multiprocessing.get_context("fork")
    going = context.Event()
    process = context.Process(target=log_until_killed, args=(tmp_path, going))
    process.start()
    assert going.wait(60)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    rows = read_rows(tmp_path / "updates.jsonl", "update")
    assert len(rows) >= 20 and [row["update"] for row in rows] == [*range(1, len(rows) + 1)]
    FileLogger(tmp_path).keep_before(0, 20)
    assert len(read_rows(tmp_path / "updates.jsonl", "update")) == 20


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars as TensorBoard reads them, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for part in ("update", "epoch"):
        reader = EventAccumulator(str(folder / "tensorboard" / part))
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in reader.Scalars(tag)]
    return found


@pytest.mark.process
@pytest.mark.parametrize(("epoch", "update"), [(0, 0), (0, 3), (1, 4), (1, 8), (2, 9)])
def test_tensorboard_shows_no_point_twice(tmp_path: Path, epoch: int, update: int) -> None:
    pytest.importorskip("tensorboard")
    log_run(trackers.TensorBoardLogger(tmp_path / "a"), 0, 0, 3)
    whole = scalars(tmp_path / "a")
    assert whole["epoch/eval_top1"] == [(1, 4.0), (2, 8.0), (3, 12.0)]
    assert whole["update/train_loss"] == [(n, 2.0**-n) for n in range(2, 13, 2)]
    assert whole.keys() == {
        "update/epoch", "update/train_loss", "epoch/updates", "epoch/eval_top1"
    }  # fmt: skip

    first = trackers.TensorBoardLogger(tmp_path / "b")
    log_run(first, 0, 0, 3)
    for file in (tmp_path / "b").rglob("events.*"):  # as a kill leaves it: a record torn
        with open(file, "ab") as stream:
            stream.write(b"\x18\0\0\0\0\0\0\0torn")
    second = trackers.TensorBoardLogger(tmp_path / "b")
    log_run(second, epoch, update, 3)
    assert scalars(tmp_path / "b") == whole


def test_what_is_not_a_number_is_left_out_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = trackers.TensorBoardLogger(tmp_path)
    logger.keep_before(0, 0)
    logger.log_epoch({"epoch": 1, "eval_loss": None, "eval_top1": 3.0})
    # no close: a killed run does not close either
    assert scalars(tmp_path) == {"epoch/eval_top1": [(1, 3.0)]}
    logger.close()


def records(file: Path) -> Iterator[bytes]:
    """The records of LevelDB's log format, which wandb writes after a header of seven bytes."""
    data, parts = file.read_bytes(), b""
    position = 7
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # too small a rest of a block for a record
            position += 2**15 - position % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """The history that wandb would send, of all offline runs in a folder."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = record.history.item
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            rows += [row] if row else []
    return rows


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags: Any = {"folder": tmp_path, "flags": {"lr": 0.1}, "project": "test", "tags": ["a"]}
    log_run(trackers.WandbLogger(**flags), 0, 0, 1)
    wandb.teardown()  # as when the process ends: wandb's own one has written all that it will
    rows = wandb_rows(tmp_path)
    updates = [(row["update"], row["update/train_loss"]) for row in rows if "update" in row]
    assert updates == [(2, 2.0**-2), (4, 2.0**-4)]
    assert [(row["epoch"], row["epoch/eval_top1"]) for row in rows if "epoch" in row] == [(1, 4.0)]
    begun = trackers.latest_run_id(tmp_path / "wandb")
    assert begun is not None
    log_run(trackers.WandbLogger(**flags), 1, 4, 2)  # goes on with the run that the folder began
    wandb.teardown()
    assert trackers.latest_run_id(tmp_path / "wandb") == begun
    assert [row["epoch"] for row in wandb_rows(tmp_path) if "epoch" in row] == [1, 2]


def test_latest_wandb_run(tmp_path: Path) -> None:
    assert trackers.latest_run_id(tmp_path / "none") is None
    for name in ("run-20260101_000000-bbb", "offline-run-20260102_000000-a-1", "debug.log"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest-run").symlink_to("run-20260101_000000-bbb")
    assert trackers.latest_run_id(tmp_path) == "a-1"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trackers.check_trackers(False, False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    (tmp_path / "wandb").mkdir()  # as a run of wandb leaves one in the working folder
    for flags, name in (((True, False), "tensorboard"), ((False, True), "wandb")):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(UserError, match=f"--log-{name} needs the {name} package: pip install"):
            trackers.check_trackers(*flags)


class Closed(FileLogger):
    failed: bool | None = None

    def close(self, failed: bool = False) -> None:
        self.failed = failed


def test_several_loggers_as_one(tmp_path: Path) -> None:
    both = [tmp_path / "a", tmp_path / "b"]
    for folder in both:
        folder.mkdir()
    log_run(Loggers(FileLogger(both[0]), [FileLogger(both[1])]), 0, 0, 2)
    second = Closed(both[1])
    with pytest.raises(ZeroDivisionError), Loggers(FileLogger(both[0]), [second]) as loggers:
        log_run(loggers, 1, 4, 2)
        assert second.failed is False
        assert loggers.rows == read_rows(both[0] / "metrics.jsonl", "epoch")
        raise ZeroDivisionError
    assert second.failed is True
    assert contents(both[0]) == contents(both[1])
    assert len(read_rows(both[0] / "updates.jsonl", "update")) == 4


def test_curves(tmp_path: Path) -> None:
    from PIL import Image

    rows: list[dict[str, Any]] = [
        {"epoch": 1, "train_loss": None, "lr": 0.1, "images_per_s": 9.0},
        {"epoch": 2, "train_loss": 1.0, "eval_loss": 2.0, "ema_top1": 50.0, "lr": 0.1},
    ]
    curves.plot_curves([], tmp_path / "empty.png")
    curves.plot_curves(rows, tmp_path / "curves.png")
    empty, drawn = ((tmp_path / f"{name}.png").read_bytes() for name in ("empty", "curves"))
    assert Image.open(io.BytesIO(drawn)).size == (1000, 640)
    assert empty != drawn and sorted(os.listdir(tmp_path)) == ["curves.png", "empty.png"]
