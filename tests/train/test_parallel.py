"""Several processes, started as users start them: equal to one, split, stopped, and dying."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import distributed, nn

from tests.train.helpers import (
    TORCHRUN,
    TWO_PROCESSES,
    finish,
    fork_two,
    free_port,
    image_folder,
    start,
    tiny_flags,
    train,
    two_processes,
)
from vitlinear.checkpoints.load import load_model
from vitlinear.create import build_model
from vitlinear.errors import UserError
from vitlinear.evaluation.evaluate import Evaluator
from vitlinear.processes import Processes, join_processes
from vitlinear.signals import StopSignals
from vitlinear.train import epochs
from vitlinear.train.make_model import enable_checkpointing
from vitlinear.train.parallel import check_sharding, first_process_first, in_step
from vitlinear.train.record.saved_state import read_state
from vitlinear.train.recorder import Recorder
from vitlinear.train.resume import Start
from vitlinear.train.run import parse_arguments
from vitlinear.train.setup import set_up

# Without batch normalisation, whose statistics are each process's own.
ROW = ["--model", "test_linear_deit", "--model-kwargs", "depth=2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 images to train on: nine updates of eight."""
    return image_folder(tmp_path_factory.mktemp("images"), train=24)


def row_flags(images: Path, output: Path, batch: int, *more: Any) -> list[str]:
    flags = (*ROW, "-b", batch, "--model-ema", "--model-ema-decay", 0.9, "--clip-grad", 1)
    aug = ("--aa", "rand-m9-mstd0.5-inc1", "--log-interval", 1)
    return tiny_flags(images, output, *flags, *aug, *more)


def curve(path: Path) -> list[float]:
    rows = map(json.loads, (path / "updates.jsonl").read_text().splitlines())
    return [row["train_loss"] for row in rows]


@pytest.fixture(scope="module")
def one(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with batches of eight; its first epoch alone, too."""
    path = tmp_path_factory.mktemp("one")
    whole = row_flags(images, path / "run", 8)
    train_here(whole)
    train_here([*row_flags(images, path / "half", 8), "--stop-epoch", "1"])
    return path


def train_here(flags: list[str]) -> None:
    from vitlinear.train import run

    run.train(parse_arguments(flags))


def assert_same_run(found: Path, expected: Path) -> None:
    """The same sums in another order: float32 rounding (6e-8), grown over 18 updates of Adam.

    Measured: 1.2e-7 for both. A gradient of another scale or an image of another augmentation
    changes the third digit of the curve.
    """
    assert len(curve(expected)) == 18
    assert curve(found) == pytest.approx(curve(expected), rel=1e-5)
    for kind in ("state_dict", "state_dict_ema"):
        ours, theirs = (read_state(path / "last_state.pt")[kind] for path in (found, expected))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(
    images: Path, one: Path, tmp_path: Path
) -> None:
    output = two_processes(*row_flags(images, tmp_path / "run", 4))
    assert output.count("epoch 1: loss") == 1
    assert_same_run(tmp_path / "run", one / "run")


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.slow
def test_two_machines_equal_one_process_with_the_doubled_batch(
    images: Path, one: Path, tmp_path: Path
) -> None:
    """Two launchers that find each other, as on two machines."""
    launch = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    launch += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=test", "tools/train.py"]
    flags = [*row_flags(images, tmp_path / "run", 4), "--device", "cpu"]
    ends = [finish(process) for process in [start([*launch, *flags]) for _ in range(2)]]
    for status, output in ends:
        assert status == 0, output[-3000:]
    assert sum("epoch 1: loss" in output for _, output in ends) == 1
    assert_same_run(tmp_path / "run", one / "run")


@pytest.mark.process
@pytest.mark.slow
def test_a_split_model_trains_saves_and_loads_everywhere(
    images: Path, one: Path, tmp_path: Path
) -> None:
    """One epoch in one process and one split over two, in either order."""
    path = tmp_path / "run"
    two_processes(*row_flags(images, path, 4), "--fsdp", "--stop-epoch", 1)
    train_here([*row_flags(images, path, 8), "--resume", "auto"])
    assert_same_run(path, one / "run")
    two_processes(*row_flags(images, one / "half", 4), "--fsdp", "--resume", "auto")
    assert_same_run(one / "half", one / "run")
    load_model(path / "last.safetensors")


@pytest.mark.process
@pytest.mark.slow
def test_a_split_model_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    """With batch norms, average, accumulation, recomputation, self-distillation: it learns."""
    flags = ("--fsdp", "--amp", "--amp-dtype", "bfloat16", "--model-ema", "-b", 4, "--lr", 1e-2)
    flags += ("--grad-accum-steps", 2, "--grad-checkpointing", "--clip-grad", 1)
    flags += ("--clip-mode", "value", "--mesa", 1, "--mesa-start-epoch", 1, "--epochs", 3)
    flags += ("--color-jitter", 0, "--scale", 0.8, 1.0)
    two_processes(*tiny_flags(folder, tmp_path / "run", *flags))
    losses = curve(tmp_path / "run")
    assert len(losses) == 3 and losses[-1] < losses[0]
    state = read_state(tmp_path / "run" / "last_state.pt")
    assert state["task_state"] == {"updates": 6}
    assert {value.dtype for value in state["state_dict"].values()} == {torch.float32, torch.int64}


def test_what_a_split_model_cannot_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start several, with torchrun"):
        train(folder, tmp_path / "run", "--fsdp")
    for flags, message in (
        (["--amp"], "use --amp-dtype bfloat16"),
        (["--opt", "muon"], "--opt muon is not known to work with --fsdp; .*adamw"),
        (["--clip-grad", "1", "--clip-mode", "agc"], "use norm or value"),
    ):
        config = parse_arguments(["--fsdp", *flags])
        with pytest.raises(UserError, match=message):
            check_sharding(config.optimiser, config.device, Processes(world_size=2))


@pytest.mark.parametrize("own", [0, 1, 3])
def test_a_process_whose_stream_ends_goes_along_with_the_others(
    monkeypatch: pytest.MonkeyPatch, own: int
) -> None:
    """Three batches elsewhere: as many here, of which the blank ones do not count."""
    others = iter([1, 1, 1, 0])

    def all_reduce(left: torch.Tensor, op: Any) -> None:
        left.clamp_(min=next(others))

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    streamed = [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))] * own
    evaluator, seen = Evaluator(), 0
    for images, labels in in_step(streamed, (3, 8, 8), torch.device("cpu")):
        evaluator.update(torch.eye(len(images), 4), labels)
        seen += 1
    assert seen == 3 and evaluator.num_samples == 2 * own
    if own:
        assert evaluator.compute()["top1"] == 100.0


def test_states_of_an_epochs_end_have_the_statistics_of_all_processes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the evaluation, in which a run may be killed, and after a stop at the last update."""
    flags = tiny_flags(folder, tmp_path / "run", "--recovery-interval", 1)
    whole = set_up(parse_arguments(flags))
    whole.processes = Processes(world_size=2)
    states: list[tuple[int, set[float]]] = []

    def distribute_bn(model: nn.Module, world_size: int, reduce: bool) -> None:
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.fill_(7)

    class Noting(Recorder):
        def _save(self, at: Start, whole: dict[str, Any]) -> None:
            found = {k: v for k, v in whole["state_dict"].items() if k.endswith("running_var")}
            states.append((at.batch, set(torch.cat([*found.values()]).tolist())))

    monkeypatch.setattr(epochs, "distribute_bn", distribute_bn)
    epochs._train(whole, Noting(whole, {}), StopSignals(), Start(), 1)
    assert [(batch, values == {7.0}) for batch, values in states] == [
        (1, False),
        (2, False),
        (3, True),
        (3, True),
    ]


@pytest.mark.parametrize(
    ("how", "value", "ema"),
    [
        ("reduce", 2.0, False),
        ("broadcast", 5.0, False),
        ("", 1.0, False),
        ("reduce", 5.0, True),
    ],
)
def test_centroids_are_the_same_in_all_processes_too(
    monkeypatch: pytest.MonkeyPatch, how: str, value: float, ema: bool
) -> None:
    """As ``--dist-bn`` says, like batch norm statistics; of averages those of the first process."""
    model = build_model("test_linear_deit", num_classes=3, attention="routing")
    moved = [buffer.fill_(1) for name, buffer in model.named_buffers() if "centroids" in name]
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(3))
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, source: tensor.fill_(5))
    run: Any = SimpleNamespace(
        processes=Processes(world_size=2),
        config=parse_arguments(["--dist-bn", how]),
        updater=SimpleNamespace(ema=ema),
        task=SimpleNamespace(get_eval_model=lambda ema: model),
    )
    epochs._distribute_statistics(run)
    assert moved and {float(buffer.mean()) for buffer in moved} == {value}


def test_joining_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(UserError, match="2 processes, but MASTER_ADDR is not set"):
        join_processes(torch.device("cpu"), timeout=600)


def open_in_turn(log: str) -> None:
    """Says when each of two processes comes to the data."""
    _, processes = join_processes(torch.device("cpu"), timeout=300)

    def write(word: str) -> None:
        with open(log, "a") as file:
            file.write(f"{processes.rank} {word}\n")

    with first_process_first(processes):
        write("begins")
        write("ends")
    distributed.destroy_process_group()


@pytest.mark.process
def test_the_first_process_of_a_machine_downloads_for_the_others(tmp_path: Path) -> None:
    fork_two(open_in_turn, str(tmp_path / "log"))
    assert (tmp_path / "log").read_text() == "0 begins\n0 ends\n1 begins\n1 ends\n"


@pytest.mark.parametrize("name", ["test_ravlt", "test_linear_deit", "test_lightnet", "test_l2vit"])
def test_recomputed_gradients_are_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    images = torch.randn(2, 3, 64, 64)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1])).backward()
        return [value.grad for value in model.parameters() if value.grad is not None]

    expected = gradients()
    enable_checkpointing(model, name)
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.compile
@pytest.mark.process
@pytest.mark.slow
def test_compiled(images: Path, tmp_path: Path) -> None:
    """Accumulation has a remainder."""
    flags = tiny_flags(images, tmp_path / "run", "-b", 4, "--grad-accum-steps", 2, "--epochs", 1)
    flags += ["--torchcompile", "eager", "--channels-last", "--model-kwargs", "depths=(1,0,0,0)"]
    flags += ["--validation-batch-size", "5"]  # all of a process: each size is compiled anew
    flags += ["--amp", "--amp-dtype", "bfloat16", "--drop-path", "0.1"]
    output = two_processes(*flags)
    assert output.count("epoch 1: loss") == 1
    state = read_state(tmp_path / "run" / "last_state.pt")
    assert state["updates"] == 5 and state["images_per_batch"] == 8


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    "death", [pytest.param("unreadable", marks=pytest.mark.nightly), "SIGKILL"]
)
def test_a_process_that_dies_ends_the_run(tmp_path: Path, death: str) -> None:
    """The launcher ends before the others give up waiting, with the cause, once."""
    data = image_folder(tmp_path / "data")
    if death == "unreadable":
        victim = data / "train" / "ant" / "3.png"
        victim.write_bytes(victim.read_bytes()[:60])
    flags = tiny_flags(data, tmp_path / "run", "-b", 4, "--epochs", 1000)
    process = start([*TWO_PROCESSES, *flags, "--device", "cpu"])
    if death == "SIGKILL":
        wait_for(process, tmp_path / "run" / "last_state.pt")
        os.kill(int(children(process.pid)[1]), signal.SIGKILL)
    status, output = finish(process)  # in half the time that processes wait for each other
    assert status != 0
    if death == "SIGKILL":
        assert output.count("Signal 9 (SIGKILL) received") == 1
    else:
        assert output.count("error: cannot read image") == 1
        cause = output.split("Root Cause")[1]
        assert f"error: cannot read image {victim}: image file is truncated" in cause
    assert 'File "' not in output.split("ChildFailedError")[1], "no traceback of the survivor"


def wait_for(process: subprocess.Popen, path: Path, seconds: float = 200) -> None:
    """Returns when a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, finish(process)[1][-3000:]
        time.sleep(0.05)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


SRUN = """#!{python}
# As SLURM's: two tasks on this machine, told their numbers; signals are passed on to all of them,
# and one that fails ends the others. The tasks are forks of this process, which imports for both.
import os, runpy, signal, sys, time
sys.path[0] = os.getcwd()
import vitlinear_cli, vitlinear.train.run
command = [part for part in sys.argv[1:] if not part.startswith("--kill-on-bad-exit")]
tasks, ends = [], {{}}
def pass_on(number, frame):
    for task in tasks:
        if task not in ends:
            os.kill(task, number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, pass_on)
for rank in range(2):
    task = os.fork()
    if not task:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        names = {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": 2}}
        os.environ.update((key, str(value)) for key, value in names.items())
        assert command[1] == "-m"
        sys.argv = command[2:]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        sys.exit(0)
    tasks.append(task)
while len(ends) < 2:
    for task in tasks:
        if task not in ends:
            done, status = os.waitpid(task, os.WNOHANG)
            if done:
                ends[task] = os.waitstatus_to_exitcode(status)
    if any(ends.values()):
        pass_on(signal.SIGKILL, None)
    time.sleep(0.02)
sys.exit(max(end if end >= 0 else 128 - end for end in ends.values()))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = show ] && echo localhost || true
"""


@pytest.mark.process
@pytest.mark.slow
def test_slurm_script_requeues_and_resumes(folder: Path, tmp_path: Path) -> None:
    """The real script and trainer, stand-ins for srun and scontrol: notice, requeue, the end."""
    log, path = tmp_path / "scontrol.log", tmp_path / "run"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text.format(python=sys.executable, log=log))
        (tmp_path / name).chmod(0o755)
    port = free_port()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VITLINEAR_PYTHON": sys.executable,
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": str((port - 10000) % 20000 + 20000),
    }
    script = ["bash", "tools/slurm/train.sbatch"]
    flags = [*tiny_flags(folder, path, "-b", 4), "--device", "cpu"]
    process = start([*script, *flags, "--epochs", 400], **environment)
    wait_for(process, path / "last_state.pt")
    process.send_signal(signal.SIGUSR1)
    status, output = finish(process)
    assert status == 0, output[-3000:]
    assert output.count("stopped by SIGUSR1") == 1 and "back into the queue" in output
    job = environment["SLURM_JOB_ID"]
    assert log.read_text().splitlines() == ["show hostnames localhost", f"requeue {job}"]
    done = read_state(path / "last_state.pt")["epoch"]
    assert 0 < done < 400

    status, output = finish(start([*script, *flags, "--epochs", done + 2], **environment))
    assert status == 0, output[-3000:]
    assert read_state(path / "last_state.pt")["epoch"] == done + 2
    assert f"epoch {done + 2}: loss" in output and "epoch 1: loss" not in output
    assert len(log.read_text().splitlines()) == 3, "a job that is done stays out of the queue"

    status, output = finish(start([*script, "--model", "ravlt_t"], **environment))
    assert status == 2 and "name the run folder with --output" in output
