"""The kernels compile for a GPU, on a machine without one: what the interpreter lets pass, this
finds. Nothing runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.ops.triton.ahead_of_time import compile_call, record_call  # noqa: E402
from vitlinear import ops  # noqa: E402
from vitlinear.ops.triton import INTERPRETING  # noqa: E402

SHARED_MEMORY = 227 * 1024  # bytes that a block may have on Hopper
SHORT, LONG = 14, 200  # tokens on a side: one kernel, and splits

pytestmark = pytest.mark.skipif(INTERPRETING, reason="needs Triton's compiler")


def check(monkeypatch, *call, **options):
    with monkeypatch.context() as context:
        recorded = record_call(context, *call, **options)
    assert len(compile_call(recorded, SHARED_MEMORY)) >= 2


@pytest.mark.parametrize("side", [SHORT, LONG])
def test_compiles(side, monkeypatch):
    check(monkeypatch, "rala", torch.bfloat16, 32, side, mask=True, head_scale=True)


@pytest.mark.slow
@pytest.mark.parametrize("side", [SHORT, LONG])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
def test_every_mechanism_compiles(mechanism, dtype, rotary, side, monkeypatch):
    check(monkeypatch, mechanism, dtype, 32, side, rotary=rotary)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [8, 20, 48, 64, 128])
@pytest.mark.parametrize("mechanism", ["mala", "nala", "lightnet"])
def test_every_head_size_compiles(mechanism, dim, monkeypatch):
    for side in (SHORT, LONG):
        check(monkeypatch, mechanism, torch.bfloat16, dim, side)
