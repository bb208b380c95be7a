"""Shared by the training tests: a small image folder, and flags of a run that takes a second."""

import contextlib
import faulthandler
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vitlinear_cli as cli
from vitlinear.create import build_model, data_config
from vitlinear.data.dataset import open_split
from vitlinear.data.loader import train_loader
from vitlinear.train import run

# What starts of training share: a process that has imported everything, and forks. Importing alone
# takes more time than all that these tests then compute. A process of tests has one such server: it
# imports what subjects of benchmarks need too, and starts before a benchmark names its own list.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("vitlinear_cli", "vitlinear.train.run"),
        *("vitlinear.benchmark.subject", "benchmarks.subject", "torch._dynamo", "torch.export"),
    ]
)

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO_PROCESSES = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "tools/train.py"]
CLASSES = ("ant", "bee", "cat")
TINY = {
    "embed_dims": (8, 8, 16, 16),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
    "mlp_ratios": (1.0, 1.0, 1.0, 1.0),
    "head_width": 16,
}
TINY_FLAGS = ["--model", "test_ravlt", "--img-size", "32", "--model-kwargs"] + [
    f"{key}={value}".replace(" ", "") for key, value in TINY.items()
]


def image_folder(root: Path, train: int = 8, val: int = 3, size: int = 32) -> Path:
    """Writes a learnable folder data set: each class is a hue plus noise."""
    random = np.random.RandomState(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.randint(0, 40, (size, size, 3))
                pixels[..., label] += 200
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def tiny_flags(data: Path, output: Path, *more: Any) -> list[str]:
    """Flags of a run of two epochs of three updates."""
    flags = ["--data-dir", data, "--output", output, *TINY_FLAGS]
    flags += ["-j", 0, "-b", 8, "--epochs", 2, "--lr", 1e-3, "--warmup-epochs", 1, "--no-plot"]
    return [str(flag) for flag in (*flags, *more)]


def train(data: Path, output: Path, *more: Any) -> dict[str, Any]:
    """Runs `tiny_flags` in this process."""
    return run.train(run.parse_arguments(tiny_flags(data, output, *more)))


def tiny_loader(data: Path, *flags: Any, rank: int = 0, world_size: int = 1) -> Any:
    """The training loader of `tiny_flags`."""
    config = run.parse_arguments(tiny_flags(data, data, *flags))
    size = config.schedule.batch_size
    seed = config.run.seed
    dataset = open_split(config.data, "train", train=True, mode="RGB", batch_size=size, seed=seed)
    return train_loader(
        dataset,
        config.augmentation,
        data_config(build_model("test_ravlt", num_classes=3), {"img_size": 32}),
        len(CLASSES),
        torch.device("cpu"),
        batch_size=size,
        workers=config.data.workers,
        rank=rank,
        world_size=world_size,
    )


def start(command: Sequence[Any], **environment: str) -> subprocess.Popen:
    """Starts a command in the checkout, one thread a process, both outputs in one pipe."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str]:
    """Returns status and output; the limit is against a hang."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def free_port() -> int:
    """A port that is free, and still is when a run listens on it some seconds later.

    The system gives its own choice, which is from 32768 on, to every connection that opens
    meanwhile: those of other tests too.
    """
    while True:
        port = 10000 + secrets.randbelow(20000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("", port))
            return port


def fork_two(function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> str:
    """Calls a function of a module in two processes that can join a group; returns their output.

    They are told of each other as torchrun tells them.
    """
    codes, text = fork_ranks(2, function, *arguments, timeout=timeout)
    assert codes == [0, 0], f"exit codes {codes}\n{text[-3000:]}"
    return text


def fork_ranks(
    count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300
) -> tuple[list[int | None], str]:
    """The same in any number of processes; returns their exit codes and output."""
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
    }
    with tempfile.NamedTemporaryFile("r") as output:
        call = (environment, output.name, function, *arguments)
        processes = [FORKS.Process(target=_run_rank, args=(rank, *call)) for rank in range(count)]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [process.exitcode for process in processes], output.read()


def _run_rank(
    rank: int,
    environment: dict[str, str],
    output: str,
    function: Callable[..., Any],
    *arguments: Any,
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    faulthandler.enable(file)  # a crash would leave nothing else to look at
    sys.exit(function(*arguments))


def fork_command(*arguments: Any, timeout: float = 300) -> tuple[int | None, str, str]:
    """Runs the command in a process that has imported it; returns status, output and errors.

    For what the streams of a process show, and this one's, which pytest holds, do not.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("out", "err")]
        process = FORKS.Process(target=_run_command, args=(files, [*map(str, arguments)]))
        process.start()
        try:
            process.join(timeout)
        finally:
            process.kill()
            process.join()
        out, err = (Path(file).read_text() for file in files)
        return process.exitcode, out, err


def _run_command(files: Sequence[str], arguments: list[str]) -> None:
    for standard, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), standard)
    sys.exit(cli.main(arguments))


def two_processes(*flags: Any) -> str:
    """Trains in two processes on this CPU; returns their output."""
    return fork_two(cli.main, ["train", *map(str, flags), "--device", "cpu"])
