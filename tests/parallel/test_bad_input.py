"""Processes that disagree, have no rows, or lose one of them: an error in all, and no hang."""

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.as_trained import make
from tests.parallel.comparing import mesh_of_all
from tests.parallel.ranks import Ranks
from vitlinear.errors import LostPeerError, UserError
from vitlinear.parallel import parallelize, shard_rows, split_rows

TIMEOUT = 15  # seconds, of the group that loses a process; it has to come together in them too


def forward(
    rank: int,
    *,
    name: str = "test_linear_deit",
    height: int = 64,
    width: int = 48,
    seed: int = 0,
    image_seed: int = 0,
    training: bool = False,
    dtype: torch.dtype = torch.float32,
    context: Callable[[], Any] = contextlib.nullcontext,
    change: Callable[[nn.Module], object] = lambda model: None,
    sizes: Any = None,
) -> Tensor:
    """A forward pass in one of two processes, with what is special about it."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=5).to(dtype).train(training)
    mesh = mesh_of_all()
    parallelize(model, mesh)
    change(model)
    torch.manual_seed(image_seed)
    images = torch.randn(1, 3, height, width, dtype=dtype)
    shard, rows = shard_rows(images, mesh, sizes=sizes)
    with context(), rows:
        return model(shard)


# What the second process does differently, and what is said about it.
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"width": 64}, "the shape of the images: .*48.* in process 0, .*64.* in process 1"),
    "height": ({"height": 128}, "the shape of the images"),
    "image": ({"image_seed": 1}, "differ in the images: .*each has to get the same images"),
    "dtype": ({"dtype": torch.float64}, "the type of the images: torch.float32 in process 0"),
    "model": ({"name": "test_lightnet"}, "the model: LinearDeiT .*LightNet"),
    "weights": ({"seed": 1}, "the weights of the model: .*same torch.manual_seed"),
    "mode": ({"training": True}, "the mode of the model: eval in process 0, train in process 1"),
    "gradients": ({"context": torch.no_grad}, "recording of gradients: on in process 0, off"),
    "autocast": (
        {"context": lambda: torch.autocast("cpu", torch.bfloat16)},
        "autocast: off in process 0, torch.bfloat16 in process 1",
    ),
    "sizes": (
        {"sizes": (16, 48)},
        r"the rows of each process: \[\(0, 32\), .* in process 0, \[\(0, 16\), .*; give the same",
    ),
    "no rows in one": ({"sizes": (63, 1)}, "the rows of each process: .*the same height, sizes"),
}


def errors_of_differences() -> dict[str, str]:
    """The errors of this process in all of `DIFFERENCES`; none with other random numbers."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    forward(rank, training=True)
    found = {}
    for name, (special, _) in DIFFERENCES.items():
        try:
            forward(rank, **(special if rank else {}))
            found[name] = "no error"
        except UserError as error:
            found[name] = str(error)
    forward(rank)  # and the group goes on
    return found


@pytest.mark.process
def test_processes_that_disagree(two: Ranks) -> None:
    first, second = two.run(errors_of_differences)
    assert first == second
    for name, (_, message) in DIFFERENCES.items():
        assert re.search(message, first[name]), (name, first[name])
        assert "\n" not in first[name]


def errors_of_few_rows() -> list[str]:
    """The errors of images that are too small, and of cuts that leave a process without rows."""
    rank, found = torch.distributed.get_rank(), []
    for special in (
        {"height": 16},
        {"name": "test_ravlt", "height": 64, "sizes": (63, 1)},
        {"height": 64, "sizes": (64, 0)},
        {"height": 64, "sizes": (32, 16)},
    ):
        try:
            forward(rank, **special)
            found.append("no error")
        except UserError as error:
            found.append(str(error))
    forward(rank)
    return found


@pytest.mark.process
def test_fewer_rows_than_processes(two: Ranks) -> None:
    first, second = two.run(errors_of_few_rows)
    assert first == second
    assert "2 processes cannot share an image of 16 rows" in first[0]
    assert "process 1 of the 2 that share an image has no row of the map of" in first[1]
    assert "sizes [64, 0] do not share 64 rows among 2 processes" in first[2]
    assert "sizes [32, 16] do not share 64 rows" in first[3]


def lose_one(how: str) -> tuple[str, float]:
    """A training step in which the second process ends, or falls silent, amid the forward pass."""
    rank = torch.distributed.get_rank()
    model: Any = make("test_ravlt_linear", torch.float32)
    mesh = mesh_of_all()
    parallelize(model, mesh)
    if rank == 1:
        model.stages[1].register_forward_pre_hook(lambda *_: _leave(how))
    shard, rows = shard_rows(torch.zeros(1, 3, 96, 32), mesh)
    began = time.monotonic()
    try:
        with rows:
            model(shard).sum().backward()
    except LostPeerError as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


def _leave(how: str) -> None:
    if how == "silence":
        time.sleep(4 * TIMEOUT)
    os._exit(1)


@pytest.mark.process
@pytest.mark.parametrize("how", ["death", "silence"])
def test_a_process_that_is_lost(how: str, tmp_path: Path) -> None:
    ranks = Ranks(3, str(tmp_path / "store"), timeout=TIMEOUT)
    try:
        ends = ranks.run(lose_one, how, of=(0, 2))
    finally:
        ranks.kill()
    for error, seconds in ends:
        assert "this process lost another" in error and "\n" not in error
        assert seconds < 3 * TIMEOUT


@pytest.mark.process
def test_an_image_of_which_each_process_has_its_rows(two: Ranks) -> None:
    """Nobody has the whole: only the rows are compared, without their number."""
    assert two.run(parts_alone) == [[(0, 32)], [(32, 64)]]


def parts_alone() -> list[tuple[int, int]]:
    mesh = mesh_of_all()
    model = parallelize(make("test_linear_deit", torch.float32), mesh)
    rows = split_rows(64, mesh)
    with rows:
        model(torch.zeros(1, 3, rows.own.stop - rows.own.start, 48))
    return [tuple(rows.own)]
