"""The committed table of what kernels take of a GPU: as compiled, and nothing spills unnamed."""

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
ALWAYS = {("l2", 32, 80, "float16")}
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


# The compiler keeps two registers of these in memory to have 64, with which one more program shares
# a processor; limited to 72, they have 72 and spill nothing.
BY_CHOICE = {("elu", 64, "state", 80, "float16"), ("inline", 32, "state", 80, "float16")}


def test_no_kernel_spills():
    spilling = {
        (row["mechanism"], row["head_dim"], row["kernel"], row["capability"], row["dtype"])
        for row in RECORD["kernels"]
        if row["spilled_bytes"]
    }
    assert spilling == BY_CHOICE


# A state of 256 x 64 lanes in two halves of its columns: with sixteen warps it spills
# (benchmarks/accounts/kernels.md).
MORE_REGISTERS = {
    ("nala", 96, 80, "bfloat16"), ("nala", 96, 80, "float16"),
    ("nala", 96, 90, "bfloat16"), ("nala", 96, 90, "float16"),
    ("nala", 64, 80, "float16"),
}  # fmt: skip


def test_registers_of_the_pass_over_queries():
    """Below 192 but for the named ones; two programs share a processor where it is 128."""
    rows = [row for row in RECORD["kernels"] if row["kernel"] == "query"]
    more = {
        (row["mechanism"], row["head_dim"], row["capability"], row["dtype"])
        for row in rows
        if row["registers"] >= 192
    }
    assert rows and more == MORE_REGISTERS
