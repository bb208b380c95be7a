"""Numbers of an epoch, in one process and in two, whole and resumed."""

import io
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from tqdm import tqdm

from tests.train.helpers import fork_two
from vitlinear.train.progress import TIMES, Progress, clock, peak_memory
from vitlinear.train.timers import HostTimer, StreamTimer


class Clock:
    """Stands for ``time``: moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in ("progress", "timers"):
        monkeypatch.setattr(f"vitlinear.train.{module}.time", found)
    return found


def batches(count: int, classes: int = 5) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Losses, logits and targets; the last batch is smaller, every third one mixed."""
    random = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        size = 3 if index + 1 == count else 8
        target = torch.randint(classes, (size,), generator=random)
        if index % 3 == 2:
            target = torch.rand(size, classes, generator=random).softmax(1)
        loss = torch.rand((), generator=random)
        found.append((loss, torch.randn(size, classes, generator=random), target))
    return found


def run(
    progress: Progress, data: Iterable[Any], accumulate: int = 1, stop: int | None = None
) -> list[dict[str, Any]]:
    """Goes through the first epoch of a run, to its end or to batch ``stop``."""
    rows = []
    with progress:
        for loss, output, target in progress.over(data):
            progress.add(loss, output, target)
            if progress.done % accumulate == 0 or progress.done == progress.total:
                updates = -(-progress.done // accumulate)
                if values := progress.updated(updates, lr=0.5 / updates):
                    rows.append({"update": updates, **values})
            if progress.done == stop:
                break
    return rows


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMES}


def test_means_over_images_since_the_last_look_and_of_the_epoch() -> None:
    data = batches(7)
    progress = Progress(7, epoch=2, epochs=3, log_interval=3, show=False)
    rows = run(progress, data)
    assert [row["update"] for row in rows] == [3, 6, 7]
    hits, sizes = [], [len(output) for _, output, _ in data]
    for _, output, target in data:
        labels = target if target.ndim == 1 else target.argmax(1)
        hits.append(int((output.argmax(1) == labels).sum()))
    sums = [loss.item() * size for (loss, _, _), size in zip(data, sizes, strict=True)]
    for row, part in zip(rows, (slice(0, 3), slice(3, 6), slice(6, 7)), strict=True):
        assert row["train_loss"] == pytest.approx(sum(sums[part]) / sum(sizes[part]))
        assert row["train_top1"] == pytest.approx(100 * sum(hits[part]) / sum(sizes[part]))
        assert (row["epoch"], row["lr"]) == (2, 0.5 / row["update"])
    whole = progress.metrics()
    assert whole["train_loss"] == pytest.approx(sum(sums) / sum(sizes))
    assert whole["train_top1"] == pytest.approx(100 * sum(hits) / sum(sizes))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [1, 4, 6, 10])
def test_resumed_in_the_middle_gives_the_same_numbers(accumulate: int, stop: int) -> None:
    data = batches(11)
    flags: Any = {"log_interval": 2, "show": False}
    whole = Progress(11, **flags)
    rows = run(whole, data, accumulate)
    first = Progress(11, **flags)
    before = run(first, data, accumulate, stop)
    state = json.loads(json.dumps(first.state()))  # plain numbers go anywhere
    second = Progress(11, done=stop, state=state, **flags)
    after = run(second, data[stop:], accumulate)
    assert [*map(without_times, before + after)] == [*map(without_times, rows)]
    assert without_times(second.metrics()) == without_times(whole.metrics())
    assert second.metrics()["seconds"] > state["seconds"]


def slow(fake: Clock, count: int, wait: float) -> Iterator[Any]:
    for batch in batches(count):
        fake.now += wait
        yield batch


def test_speed_share_of_waiting_and_what_is_left(
    fake: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second of waiting and three of computing for each batch, half an hour around an epoch."""
    flags: Any = {"epoch": 3, "epochs": 10, "log_interval": 2, "epoch_seconds": 1800.0}
    progress = Progress(4, **flags)
    with progress:
        batches = progress.over(slow(fake, 4, 1.0))
        for updates, (loss, output, target) in enumerate(batches, 1):
            fake.now += 3.0
            progress.add(loss, output, target)
            values = progress.updated(updates, 0.1)
            if values and updates == 2:
                assert values["images_per_s"] == 16 / 8
                assert (values["data_wait"], values["seconds"]) == (0.25, 8)
    state = progress.state()
    assert (state["seconds"], state["wait"]) == (16, 4)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 3/10, batch 2/4, update 2: loss 0.")
    assert "2 images/s, 25% waiting for data" in first and "GiB, lr 1.00e-01; " in first
    assert first.endswith("left 0:00:08 of the epoch, 3:30:08 of the run")
    assert last.endswith("left 0:00:00 of the epoch, 3:30:00 of the run")

    fake.now = 1000.0  # another process, another clock
    progress = Progress(4, done=4, state=state, **flags)
    with progress:
        fake.now += 4.0
    assert progress.metrics()["seconds"] == 20
    assert progress.metrics()["images_per_s"] == 27 / 20


def test_without_a_known_epoch_the_batches_so_far_tell(
    fake: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Progress(4, epoch=1, epochs=3, log_interval=2), slow(fake, 4, 60.0))
    assert "left 0:02:00 of the epoch, 0:10:00 of the run" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # no thread that outlives the test
    with monkeypatch.context() as patch:
        patch.setattr(
            "vitlinear.train.progress.tqdm",
            lambda **flags: tqdm(**{**flags, "ncols": 200}, file=screen),
        )
        progress = Progress(5, epoch=1, epochs=2, log_interval=2)
        run(progress, batches(5))
    drawn = screen.getvalue()
    assert "epoch 1/2:" in drawn and "/5 [" in drawn
    assert "% waiting for data, " in drawn and ", run 0:00:0" in drawn and "lr 2.50e-01" in drawn
    assert progress.bar is not None and progress.bar.n == 5
    assert capsys.readouterr().out == ""


def test_nothing_is_shown_by_other_processes(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(3, show=False)
    assert run(progress, batches(3))
    progress.note("an update was skipped")
    assert capsys.readouterr() == ("", "")


def test_the_device_is_read_at_looks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading waits for a GPU; a step must not."""
    reads = 0

    def counted(method: Any) -> Any:
        def call(self: torch.Tensor, *args: Any) -> Any:
            nonlocal reads
            reads += 1
            return method(self, *args)

        return call

    data = batches(10)
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    run(Progress(10, log_interval=4, show=False), data)
    assert reads == 3  # after updates 4, 8 and 10


def half_of_the_batches(folder: Path) -> None:
    """The part of each of two processes; leaves its numbers in the folder."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    data = batches(12)[rank::2]
    first = Progress(6, log_interval=2, show=rank == 0)
    rows = run(first, data, stop=3)
    state = first.state()
    second = Progress(6, done=3, state=state, log_interval=2, show=rank == 0)
    rows += run(second, data[3:])
    (folder / f"{rank}.json").write_text(json.dumps([rows, second.metrics(), state]))
    distributed.destroy_process_group()


@pytest.mark.process
def test_two_processes_tell_of_all_images(tmp_path: Path) -> None:
    lines = fork_two(half_of_the_batches, tmp_path).splitlines()
    assert len(lines) == 3 and all("loss" in line for line in lines)
    (rows, whole, state), (rows_of_other, whole_of_other, _) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)
    )
    assert [*map(without_times, rows)] == [*map(without_times, rows_of_other)]
    assert without_times(whole) == without_times(whole_of_other)

    one = Progress(12, log_interval=2, show=False)
    expected = run(one, batches(12), accumulate=2)
    # one process goes on with what two have begun
    after = Progress(12, done=6, state=state, log_interval=2, show=False)
    run(after, batches(12)[6:], accumulate=2)
    found, wanted = [*rows, whole, after.metrics()], [*expected, one.metrics(), one.metrics()]
    for got, want in zip(found, wanted, strict=True):
        assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-12)
        assert got["train_top1"] == pytest.approx(want["train_top1"], rel=1e-12)


def test_batches_without_a_finite_loss_count_nowhere() -> None:
    data = batches(4)
    spoilt = [*data[:2], (torch.tensor(float("nan")), *data[2][1:]), *data[2:]]
    first, second = (Progress(len(x), log_interval=9, show=False) for x in (data, spoilt))
    run(first, data)
    run(second, spoilt)
    assert without_times(first.metrics()) == without_times(second.metrics())
    nothing = Progress(1, show=False)
    (row,) = run(nothing, [spoilt[2]])
    assert math.isnan(row["train_loss"]) and math.isnan(row["train_top1"])


def test_durations() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.6, 3599, 360000)] == [
        "0:00:00", "0:01:00", "0:59:59", "100:00:00"
    ]  # fmt: skip


def test_peak_memory_of_this_process() -> None:
    """At least what is held now; it never falls."""
    before = peak_memory(torch.device("cpu"))["peak_memory_gib"]
    held = torch.ones(2**26)  # 256 MiB
    after = peak_memory(torch.device("cpu"))["peak_memory_gib"]
    assert 0.05 < before <= after < 1000 and after >= held.nbytes / 2**30


def test_host_timer(fake: Clock) -> None:
    timer = HostTimer(2.0)
    for _ in range(3):
        timer.begin()
        fake.now += 0.5
        timer.end()
        fake.now += 7
    assert timer.read() == 3.5


@pytest.mark.gpu
def test_stream_timer_counts_only_what_the_gpu_waits() -> None:
    matrix = torch.randn(8192, 8192, device="cuda")

    def work() -> None:
        for _ in range(20):
            torch.mm(matrix, matrix)

    work()
    torch.cuda.synchronize()
    hidden, idle = StreamTimer(), StreamTimer()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    busy = time.perf_counter() - start
    for timer, seconds in ((hidden, busy / 4), (idle, busy + 0.3)):
        work()
        timer.begin()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        timer.end()
        work()
        timer.read()
    assert hidden.seconds < busy / 20 and 0.2 < idle.seconds < 0.4 + busy / 4
