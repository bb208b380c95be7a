"""The committed table of what kernels take of a GPU: as compiled, and nothing else spills."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernel_resources as resources  # noqa: E402
from vitlinear.ops.triton import INTERPRETING  # noqa: E402

RECORD = json.loads(resources.RESULTS.read_text(encoding="utf-8"))


def call_of(row):
    return row["mechanism"], row["head_dim"], tuple(row["terms"]), row["full_width"]


KINDS = sorted({call_of(row) for row in RECORD["kernels"]})
ALWAYS = {("mala", 64, 90, "bfloat16"), ("l2", 32, 80, "float16")}
HELD = ("kernel", "spilled_bytes", "programs_per_processor")


def held(rows):
    return sorted(tuple(row[name] for name in HELD) for row in rows)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="needs Triton's compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles for a GPU that is not there")
@pytest.mark.skipif(
    resources.triton.__version__ != RECORD["triton"], reason="another compiler, other code"
)
@pytest.mark.parametrize(
    ("kind", "capability", "dtype"),
    [
        pytest.param(
            resources.Kind(*kind),
            capability,
            dtype,
            marks=() if (*kind[:2], capability, dtype) in ALWAYS else pytest.mark.nightly,
            id=f"{kind[0]}-{kind[1]}-sm_{capability}-{dtype}",
        )
        for kind in KINDS
        for capability in resources.PROCESSORS
        for dtype in resources.DTYPES
    ],
)
def test_the_table_is_that_of_the_kernels(kind, capability, dtype):
    rows = [
        row
        for row in RECORD["kernels"]
        if call_of(row) == kind and (row["capability"], row["dtype"]) == (capability, dtype)
    ]
    assert rows and held(resources.measure(kind, capability, dtype)) == held(rows)


def test_no_kernel_spills():
    spilling = [
        (row["mechanism"], row["head_dim"], row["kernel"], row["capability"], row["dtype"])
        for row in RECORD["kernels"]
        if row["spilled_bytes"]
    ]
    assert not spilling


# Of a state of 128 x 128 lanes: with fewer registers, or more warps, some kernels spill
# (benchmarks/accounts/kernels.md).
MORE_REGISTERS = {("mala", 96, 80), ("rala", 96, 80), ("nala", 96, 80), ("nala", 96, 90)}


def test_registers_of_the_pass_over_queries():
    """Below 192 but for the named ones; two programs share a processor where it is 128."""
    rows = [row for row in RECORD["kernels"] if row["kernel"] == "query"]
    more = {
        (row["mechanism"], row["head_dim"], row["capability"])
        for row in rows
        if row["registers"] >= 192
    }
    assert rows and more == MORE_REGISTERS
    shared = {
        row["programs_per_processor"]
        for row in rows
        if row["head_dim"] == 64 and row["mechanism"] not in ("nala", "pola")
    }
    assert shared == {2}


def test_windows_share_the_processor():
    windows = [row for row in RECORD["kernels"] if row["kernel"].endswith(", windows")]
    assert {row["kernel"] for row in windows} == {"forward, windows", "backward, windows"}
    for row in windows:
        assert row["programs_per_processor"] >= 2 and row["loads_in_flight"] >= 3


def test_the_account_shows_the_record():
    text = resources.ACCOUNT.read_text(encoding="utf-8")
    assert resources.render(RECORD) in text
