"""The kernels compile for a GPU, on a machine without one: what the interpreter lets pass, this
finds. Everything happens as in a real call, up to the launch."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tests.ops.triton.cases import GRIDS  # noqa: E402
from vitlinear import ops  # noqa: E402
from vitlinear.ops.backward import LinearGradients  # noqa: E402
from vitlinear.ops.mechanisms import MIXER_ROWS  # noqa: E402
from vitlinear.ops.terms import Terms  # noqa: E402
from vitlinear.ops.triton import INTERPRETING, calls, launch, state_launch, tuning  # noqa: E402

SHARED_MEMORY = 227 * 1024  # bytes that a block may have on Hopper
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHORT, LONG = (14, 14), (200, 200)  # one kernel, and splits

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="needs Triton's compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels"),
]


HOPPER, AMPERE = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)
OTHERS = [
    AMPERE,
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx90a", 64),
    GPUTarget("hip", "gfx942", 64),
]


class Absent:
    """A driver for a GPU that is not there; each has a number, by which Triton keeps kernels."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return [HOPPER, *OTHERS].index(self.target)

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


@pytest.fixture
def target():
    """The GPU that is compiled for: Hopper."""
    return HOPPER


@pytest.fixture
def kernels(monkeypatch, target):
    """The kernels that a call compiled, by name and in order; none of them runs."""
    kernels = []
    compile_and_launch = JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        cache = self.device_caches[driver.active.get_current_device()][0]
        before = len(cache)
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.metadata.shared > SHARED_MEMORY:
            raise OutOfResources(kernel.metadata.shared, SHARED_MEMORY, "shared memory")
        if len(cache) > before:
            kernels.append((self.fn.__name__, kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", only_compile)
    monkeypatch.setattr(calls, "processors", lambda device: 132)
    monkeypatch.setattr(calls, "_prepared", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    driver.set_active(Absent(target))
    yield kernels
    driver.set_active(None)  # to be found anew; there is none


def call(
    mechanism, grid, dtype=torch.bfloat16, dim=32, heads=2, mask=False, rotary=True, epilogue=True,
    full_width=False,
):  # fmt: skip
    """A forward and a backward pass."""
    row, length = ops.get_mechanism(mechanism), grid[0] * grid[1]
    qkv = torch.zeros(2, length, 5, heads, dim, dtype=dtype)
    q, k, v, gate, lepe = qkv.unbind(2)
    tables = ops.lrpe_tables if row.positions == "cosine" else ops.rotary_tables
    rotary = rotary and row.positions != "none"
    rotary = tables(*grid, dim) if rotary else None
    if full_width:
        rotary = ops.full_width_rotary_tables(*grid, heads * dim)
    powers = torch.ones(heads, dim) if row.takes_powers else None
    weights = None
    if row.takes_key_weights:
        weights = torch.zeros(2, length, heads, row.weights_per_key(dim), dtype=dtype)
    terms = Terms(
        rotary=rotary,
        powers=powers,
        key_weights=weights,
        key_padding_mask=torch.zeros(2, length, dtype=torch.bool) if mask else None,
        head_scale=torch.ones(heads) if mask else None,
        lepe=lepe if epilogue else None,
        gate=gate if epilogue else None,
    )
    out, state = launch.forward(q, k, v, row, terms)
    grad_q, grad_k, grad_v, grad_gate, grad_lepe = torch.zeros_like(qkv).unbind(2)
    grads = LinearGradients(
        grad_q,
        grad_k,
        grad_v,
        head_scale=torch.ones(heads) if mask else None,
        lepe=grad_lepe if epilogue else None,
        gate=grad_gate if epilogue else None,
        powers=powers,
        key_weights=weights,
    )
    launch.backward(out, q, k, v, row, terms, state, grads)


@pytest.mark.slow
def test_another_resolution_compiles_nothing(kernels):
    for grid in (GRIDS[1], GRIDS[17], GRIDS[49], SHORT, LONG):  # blocks of windows, and the rest
        call("mala", grid, dim=16)
    del kernels[:]
    for grid in (*GRIDS.values(), (100, 152), (131, 77)):
        call("mala", grid, dim=16)
    assert not kernels
    call("mala", SHORT, dim=16, heads=1)
    call("mala", SHORT, dim=16, heads=7)
    assert not kernels


def in_turn(*axes, keep, every=1):
    """Cases of the product of the axes: the first ``keep`` in full, the others one value a case.

    One of ``every`` so many is for every run, the rest for the night.

    Over all cases the others take every combination. A case takes seconds to compile, and Triton's
    cache is empty after each change of a kernel; VITLINEAR_COMPILE=all asks for the whole product.
    """
    if os.environ.get("VITLINEAR_COMPILE") == "all":
        return list(itertools.product(*axes))
    rest = list(itertools.product(*axes[keep:]))
    places = itertools.product(*(range(len(axis)) for axis in axes[:keep]))
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, place, strict=False)),
            *rest[sum(place) % len(rest)],
            marks=pytest.mark.nightly if sum(place) % every else (),
        )
        for place in places
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["identity", "rala"])
def test_states_compile(mechanism, kernels):
    """By themselves, as for ViT³; no other kernels than those of a long sequence."""
    row, terms = ops.get_mechanism(mechanism), Terms(ops.full_width_rotary_tables(*LONG, 64))
    q, k = torch.zeros(2, 2, 40000, 2, 32, dtype=torch.bfloat16)
    v = torch.zeros(2, 40000, 2, 64, dtype=torch.bfloat16)
    given = ops.LinearAttentionState(torch.zeros(2, 2, 32, 64), torch.zeros(2, 2, 1, 32))
    out = state_launch.read_forward(q, given, row, terms)
    state_launch.read_backward(out, q, given, row, terms)
    names = ["read_kernel", "query_kernel", "merge_kernel"]
    if not row.has_global_query:
        state = state_launch.state_forward(k, v, row, Terms())
        state_launch.state_backward(state, k, v, row, Terms(), None)
        names += ["state_kernel", "merge_kernel", "key_kernel"]
    assert [name for name, _ in kernels] == names


@pytest.mark.slow
@pytest.mark.parametrize("grid", [SHORT, LONG], ids=["one kernel", "splits"])
def test_full_width_positions_compile(grid, kernels):
    """Once for all stages of a pyramid, which have other numbers of heads."""
    call("elu", grid, full_width=True)
    del kernels[:]
    for heads in (4, 10, 16):
        call("elu", grid, heads=heads, full_width=True)
    assert not kernels


# Positions, grid and mask: every two values of two of them occur together in every run.
PAIRS = [(False, SHORT, True), (False, LONG, False), (True, SHORT, False), (True, LONG, True)]
if os.environ.get("VITLINEAR_COMPILE") == "all":
    PAIRS = list(itertools.product([False, True], [SHORT, LONG], [False, True]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "dtype", "options"),
    in_turn(list(ops.MECHANISMS), DTYPES, PAIRS, keep=2, every=3),
    ids=str,
)
def test_every_mechanism_compiles(mechanism, dtype, options, kernels):
    rotary, grid, mask = options
    call(mechanism, grid, dtype, rotary=rotary, mask=mask)
    if not ops.get_mechanism(mechanism).has_key_softmax:  # whose sums keep what its maximum drops
        for name, kernel in kernels:
            dropping = re.findall(r"\b(?:max|min)\.(?:ftz\.)?f\d+", kernel.asm["ptx"])
            assert not dropping, f"{name} takes a number where an operand is NaN"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "target", "dtype", "grid"),
    in_turn(list(MIXER_ROWS), [HOPPER, AMPERE], DTYPES, [SHORT, LONG], keep=2, every=10),
    ids=lambda value: f"sm_{value.arch}" if isinstance(value, GPUTarget) else str(value),
)
def test_rows_of_mixers_compile(mechanism, target, dtype, grid, kernels):
    """To the binary, for the GPUs that most have."""
    call(mechanism, grid, dtype)
    names = {name for name, kernel in kernels if kernel.asm["cubin"]}
    found = (
        {"forward_kernel", "backward_kernel"} if grid == SHORT else {"state_kernel", "key_kernel"}
    )
    assert names >= found


# For each maker one in every run.
ON_OTHERS = [
    pytest.param(
        target,
        mechanism,
        dtype,
        marks=()
        if (target.arch, mechanism) in ((80, "nala"), ("gfx90a", "mala"))
        else pytest.mark.nightly,
        id=f"{target.arch}-{mechanism}-{dtype}",
    )
    for place, target in enumerate(OTHERS)
    for mechanism, dtype in [
        ("mala", torch.float16), ("nala", torch.float16), ("rala", torch.bfloat16)
    ]
    if os.environ.get("VITLINEAR_COMPILE") == "all" or place % 2 == (dtype == torch.bfloat16)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("target", "mechanism", "dtype"), ON_OTHERS)
def test_other_gpus(target, mechanism, dtype, kernels):
    """To the binary: Triton brings the assemblers of both makers along."""
    call(mechanism, LONG, dtype)
    assert kernels
    for name, kernel in kernels:
        assert kernel.asm["hsaco" if target.backend == "hip" else "cubin"], name


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "dim", "dtype"),
    [
        *in_turn(
            ["rala", "mala", "nala", "lightnet"], [8, 20, 48, 64, 128], DTYPES, keep=2, every=8
        ),
        pytest.param("pola", 64, torch.bfloat16, marks=pytest.mark.nightly),
        pytest.param("pola", 128, torch.float32, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_every_head_size_compiles(mechanism, dim, dtype, kernels):
    for grid in (SHORT, LONG):
        call(mechanism, grid, dtype, dim)
