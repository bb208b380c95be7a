"""Exchanges stand where the image is, as NCCL wants them: shown with tensors that have no values.

There is no GPU behind them: operators check devices, shapes and types, and compute nothing. Such
tensors have no backward pass on a GPU; gradients of exchanges are exchanges of what is as large.
"""

from typing import Any

import pytest
import timm
import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pairwise import pairwise
from tests.parallel.comparing import mesh_of_all, outputs_of
from tests.streaming.test_exact import MODELS
from vitlinear.parallel import parallelize, split_rows
from vitlinear.parallel.split_layers import PlacedStrided

pytestmark = pytest.mark.process

# What NCCL sends. It has no complex numbers and no 16-bit integers.
TYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int8, torch.uint8,
}  # fmt: skip
OPERATORS = {"vitlinear::exchange_rows", "vitlinear::total_rows"}


class _Exchanges(TorchDispatchMode):
    """Notes device, type and layout of all that is exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype, bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            raise AssertionError(f"{func} is not one of our exchanges")
        if func.name() in OPERATORS:
            self.found += [(x.device.type, x.dtype, x.is_contiguous()) for x in (args[0], result)]
        return result


def _exchanged(name: str, training: bool) -> list[tuple[str, torch.dtype, bool]]:
    """Tensors that a forward pass exchanges; processes compare no values, as there are none."""
    model = timm.create_model(name, attn_backend="eager").train(training)
    parallelize(model, mesh_of_all())
    rows = split_rows(105, mesh_of_all(), sizes=(64, 41))
    check = PlacedStrided.check_others
    PlacedStrided.check_others = lambda self, x, rows: None
    try:
        with FakeTensorMode() as mode, rows, _Exchanges() as exchanges:
            model._apply(lambda x: mode.from_tensor(x).to("cuda"))
            shard = torch.zeros(2, 3, rows.own.stop - rows.own.start, 80, device="cuda")
            outputs = outputs_of(model, shard, None)
            assert {x.device.type for x in outputs} == {"cuda"}
    finally:
        PlacedStrided.check_others = check
    return exchanges.found


def _exchanged_on(
    rank: int, name: str, training: bool
) -> list[tuple[str, torch.dtype, bool]] | None:
    """The same on one process alone: without values it waits for no other."""
    return _exchanged(name, training) if distributed.get_rank() == rank else None


@pairwise(every=4, name=MODELS, training=[False, True])
def test_exchanges_are_on_the_device_of_the_image(two, name, training):
    """In the first and the last rows of the image in turn."""
    rank = MODELS.index(name) // 4 % 2
    found = two.run(_exchanged_on, rank, name, training)[rank]
    assert found
    for device, dtype, contiguous in found:
        assert device == "cuda" and dtype in TYPES and contiguous
