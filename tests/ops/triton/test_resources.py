"""The committed table of what kernels take of a GPU: as compiled, and nothing spills unnamed."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernel_resources as resources  # noqa: E402
from vitlinear import ops  # noqa: E402
from vitlinear.ops.triton import INTERPRETING  # noqa: E402
from vitlinear.ops.triton.plan import make_plan  # noqa: E402

RECORD = json.loads(resources.RESULTS.read_text(encoding="utf-8"))


def call_of(row):
    return resources.Kind(*(_hashable(row[field]) for field in resources.Kind._fields))


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


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
            kind,
            capability,
            dtype,
            marks=() if (*kind[:2], capability, dtype) in ALWAYS else pytest.mark.nightly,
            id=f"{resources.label(kind)}-sm_{capability}-{dtype}".replace(", ", "-"),
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


@pytest.mark.nightly
@pytest.mark.slow  # builds all models
def test_the_table_has_every_published_call():
    assert sorted(resources.published()) == KINDS


def test_no_kernel_spills():
    assert not [row for row in RECORD["kernels"] if row["spilled_bytes"]]


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


def test_grids_count_with_the_programs_that_share_a_processor():
    """One number for a plan: between two fifths of the median of its kernels and half above it."""
    for kind in KINDS:
        row, terms = ops.get_mechanism(kind.mechanism), resources.terms_of(kind, 2)
        for capability, dtype in itertools.product(resources.PROCESSORS, resources.DTYPES):
            with resources.only_compiling(capability):
                plan = make_plan(
                    row, resources.DTYPES[dtype], kind.head_dim, terms, kind.value_dim or None
                )
            median = statistics.median(
                each["programs_per_processor"]
                for each in RECORD["kernels"]
                if (call_of(each), each["capability"], each["dtype"]) == (kind, capability, dtype)
                and each["kernel"] in ("state", "read", "query", "key")
            )
            assert 0.4 * median <= plan.programs_per_processor <= median + 0.5, (kind, dtype)
