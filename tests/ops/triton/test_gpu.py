"""The kernels on a GPU: exact to the last sum, the same every time, at any size.

References are the definition in float64 where it is quick, else the float64 eager formula, which
other tests hold to the definition. In its own precision a kernel may err twice as much as the eager
formula, and by what one rounding of the result costs.
"""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

pytest.importorskip("triton")

from tests.ops.inputs import Inputs, attend, make_inputs, operator_arguments  # noqa: E402
from tests.ops.triton.cases import (  # noqa: E402
    ROUNDING,
    by_operators,
    check_exactness,
    error,
    reference,
    run,
)
from tests.pairwise import pairwise  # noqa: E402
from vitlinear import ops  # noqa: E402

pytestmark = pytest.mark.gpu

each_mechanism = pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
each_dtype = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
HALF = torch.bfloat16


def on_gpu(inputs: Inputs) -> Inputs:
    """The same inputs on the GPU."""

    def move(x):
        if isinstance(x, ops.RotaryTables):
            return ops.RotaryTables(*map(move, x))
        if not isinstance(x, torch.Tensor):
            return x
        return x.detach().cuda().requires_grad_(x.requires_grad)

    return Inputs(*map(move, inputs))


def many_tokens(mechanism, side, dtype=HALF, batch=1, heads=1, dim=64, seed=0) -> Inputs:
    """Inputs for a grid of side x side tokens, made on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (batch, side * side, 4, heads, dim)
    projection = torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
    grad = torch.randn(*shape[:2], heads, dim, generator=generator, device="cuda", dtype=dtype)
    options = {"device": torch.device("cuda")}
    return Inputs(
        projection.requires_grad_(),
        ops.rotary_tables(side, side, dim, **options),
        None,
        grad,
        ops.lrpe_tables(side, side, dim, **options),
    )


@each_mechanism
@each_dtype
def test_as_exact_as_eager(mechanism, dtype):
    check_exactness(mechanism, on_gpu(make_inputs(grid=(14, 14), dim=32, dtype=dtype)))


@pytest.mark.parametrize("mechanism", ["elu", "rala"])
@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("grid", [(9, 11), (40, 41)], ids=["one kernel", "splits"])
def test_full_width_positions(mechanism, heads, grid):
    inputs = make_inputs(grid=grid, heads=heads, dim=32, dtype=HALF)
    inputs = inputs._replace(rotary=ops.full_width_rotary_tables(*grid, heads * 32))
    check_exactness(mechanism, on_gpu(inputs))


@pytest.mark.parametrize("mechanism", ["identity", "pola"])
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("side", [9, 56])
def test_values_of_another_width(mechanism, width, side):
    """And the gradients of powers, where there are any."""
    inputs = many_tokens(mechanism, side, torch.float32, batch=2, heads=2, dim=32)
    q, k, *_ = inputs.projection.detach().unbind(2)
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (*q.shape[:3], width)
    v, grad = torch.randn(2, *shape, generator=generator, device="cuda").unbind(0)
    powers = inputs.terms(mechanism).powers
    given = [x for x in (q, k, v, powers) if x is not None]

    def call(backend, dtype):
        q, k, v, *rest = (x.detach().to(dtype).requires_grad_() for x in given)
        out = ops.linear_attention(
            q, k, v, mechanism=mechanism, powers=rest[0] if rest else None, backend=backend
        )
        return out, *torch.autograd.grad(out, (q, k, v, *rest), grad.to(dtype))

    exact, plain, fused = (
        call(*how)
        for how in (("eager", torch.float64), ("eager", torch.float32), ("triton", torch.float32))
    )
    for actual, formula, expected in zip(fused, plain, exact, strict=True):
        assert error(actual, expected) <= 2 * error(formula, expected) + 1e-6


@pytest.mark.parametrize("mechanism", ["identity", "mala", "pola", "lightnet"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("side", [9, 56])
def test_states(mechanism, dtype, side):
    """A state that is returned and a read of it, as exact as by eager."""
    inputs = many_tokens(mechanism, side, dtype, batch=2, heads=2, dim=32)
    powers = inputs.terms(mechanism).powers

    def call(backend, convert):
        q, k, v, _ = (convert(x.detach()).requires_grad_() for x in inputs.projection.unbind(2))
        tables = inputs.tables(mechanism)
        options = {
            "rotary": tables and ops.RotaryTables(*map(convert, tables)),
            "powers": None if powers is None else convert(powers),
        }
        state = ops.linear_attention_state(k, v, mechanism=mechanism, **options, backend=backend)
        out = ops.read_linear_attention_state(
            q, state, mechanism=mechanism, **options, backend=backend
        )
        return out, *torch.autograd.grad(out, (q, k, v), convert(inputs.grad))

    def same(x):
        return x

    exact = call("eager", torch.Tensor.double)
    for actual, formula, expected in zip(
        call("triton", same), call("eager", same), exact, strict=True
    ):
        assert error(actual, expected) <= 2 * error(formula, expected) + ROUNDING[dtype]


def test_states_of_vittt():
    """Two reads of a learned state and a state, of values twice as wide as queries, by `auto`."""
    from vitlinear.layers.attention.ttt_attention import TttAttention

    torch.manual_seed(0)
    layers = [TttAttention(64, 2, backend=name).cuda() for name in ("triton", "eager", "auto")]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    layers[1].double()
    x, grad = torch.randn(2, 2, 56, 56, 64, device="cuda")
    results = []
    for layer in layers:
        dtype = layer.w1.dtype
        leaf = x.to(dtype).requires_grad_()
        tables = ops.full_width_rotary_tables(56, 56, 64, torch.device("cuda"), dtype)
        out = layer(leaf, tables)
        results.append(
            [out, *torch.autograd.grad(out, (leaf, *layer.parameters()), grad.to(dtype))]
        )
    for fused, exact, automatic in zip(*results, strict=True):
        assert error(fused, exact) < 1e-5 and error(automatic, exact) < 1e-5


@each_mechanism
@pytest.mark.parametrize("dim", [8, 20, 64, 128])
def test_head_sizes(mechanism, dim):
    check_exactness(mechanism, on_gpu(make_inputs(grid=(7, 9), dim=dim, dtype=HALF)))


@each_mechanism
@pytest.mark.parametrize("side", [56, 512])
def test_many_tokens(mechanism, side):
    """Through splits and their merging, up to 2^18 tokens."""
    check_exactness(mechanism, many_tokens(mechanism, side))


@each_mechanism
@pytest.mark.parametrize("side", [8, 56])
def test_mask_and_head_scale(mechanism, side):
    inputs = many_tokens(mechanism, side, torch.float32, batch=3, dim=32)
    mask = torch.rand(3, side * side, device="cuda") < 0.3
    mask[1] = True
    check_exactness(
        mechanism, inputs._replace(mask=mask, head_scale=torch.tensor([-1.5], device="cuda"))
    )


@each_mechanism
@pytest.mark.parametrize("grid", [(9, 11), (40, 41)], ids=["one kernel", "splits"])
def test_epilogue(mechanism, grid):
    """(out + lepe) * gate, lepe with channels first, and the gradients of both."""
    options = {"dtype": HALF, "mask": True, "epilogue": ("lepe", "gate")}
    check_exactness(mechanism, on_gpu(make_inputs(grid=grid, dim=32, **options)))


@each_mechanism
@pytest.mark.parametrize("layout", ["channels first", "heads first"])
def test_layouts_and_strided_gradients(mechanism, layout):
    check_exactness(mechanism, on_gpu(make_inputs(grid=(9, 11), dim=32, dtype=HALF)), layout)


@pairwise(
    mechanism=ops.MECHANISMS,
    case=["zero queries", "constant keys", "vanishing normaliser", "large", "huge", "zeros"],
    dtype=ROUNDING,
    side=[9, 40],
)
def test_finite(mechanism, case, dtype, side):
    inputs = many_tokens(mechanism, side, dtype, dim=32)
    projection = inputs.projection.detach()
    projection[:, :, 2] *= 300
    if case == "zero queries":
        projection[:, :, 0] = 0
    elif case == "constant keys":
        projection[:, :, 1] = projection[:1, :1, 1]
    elif case == "vanishing normaliser":
        projection[:, :, :2] = -30 - projection[:, :, :2].abs()
    elif case == "large":
        projection[:, :, :2] *= 1000
    elif case == "huge":
        largest = 1e10 if mechanism == "nala" else 1e12  # nala cubes its keys
        projection[:, :, :2] *= 10000 if dtype == torch.float16 else largest
    elif case == "zeros":
        projection.zero_()
    out, grad = run(mechanism, inputs._replace(projection=projection))
    assert out.isfinite().all() and grad.isfinite().all()


@each_mechanism
@pytest.mark.parametrize("side", [14, 56, 200])
def test_repeats_are_bit_equal(mechanism, side):
    inputs = many_tokens(mechanism, side, batch=2, heads=2, dim=32)
    first = run(mechanism, inputs)
    for _ in range(2):
        for a, b in zip(run(mechanism, inputs), first, strict=True):
            assert torch.equal(a, b)


@each_mechanism
def test_opcheck(mechanism):
    inputs = on_gpu(make_inputs(mask=True, dtype=torch.float32))
    operator, arguments = operator_arguments(mechanism, inputs)
    torch.library.opcheck(operator, (*arguments, "triton"))


def test_compile_fullgraph():
    inputs = on_gpu(make_inputs(grid=(14, 14), dim=32, dtype=HALF))
    compiled = torch.compile(attend, fullgraph=True)
    out = compiled("rala", inputs, "triton")
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    for a, b in zip((out, grad), run("rala", inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("plain", [False, True], ids=["operators", "autograd"])
@pytest.mark.parametrize("side", [7, 56])
def test_cuda_graph(side, plain):
    """Captured once, replayed on other numbers."""
    inputs = many_tokens("rala", side, batch=2, heads=2, dim=32)
    static = inputs.projection.detach().clone()

    def step():
        if plain:
            leaves = [x.detach().requires_grad_() for x in static.unbind(2)[:3]]
            options = {"mechanism": "rala", "rotary": inputs.rotary, "backend": "triton"}
            out = ops.linear_attention(*leaves, **options)
            return out, *torch.autograd.grad(out, leaves, inputs.grad)
        return by_operators("rala", static, inputs.rotary, inputs.grad, "triton")

    warm = torch.cuda.Stream()  # what autograd runs there, it must not run elsewhere in a capture
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    static.copy_(torch.randn_like(static))
    expected = step()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_export_runs_on_the_gpu():
    class Attention(torch.nn.Module):
        def forward(self, x):
            batch, height, width, _ = x.shape
            q, k, v = x.reshape(batch, height * width, 3, 2, 32).unbind(2)
            rotary = ops.rotary_tables(height, width, 32, x.device)
            return ops.linear_attention(q, k, v, mechanism="mala", rotary=rotary, backend="triton")

    x = torch.randn(2, 8, 12, 192, device="cuda", dtype=HALF)
    sizes = {1: torch.export.Dim("height", min=2), 2: torch.export.Dim("width", min=2)}
    program = torch.export.export(Attention(), (x,), dynamic_shapes=(sizes,))
    for shape in ((2, 8, 12, 192), (2, 5, 9, 192)):
        x = torch.randn(shape, device="cuda", dtype=HALF)
        assert torch.equal(program.module()(x), Attention()(x))


def test_autocast_and_checkpointing():
    inputs = many_tokens("mala", 20, torch.float32, dim=32)
    expected = run("mala", inputs)
    with torch.autocast("cuda", dtype=HALF):
        out = torch.utils.checkpoint.checkpoint(
            attend, "mala", inputs, "triton", inputs.projection, use_reentrant=False
        )
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    for a, b in zip((out, grad), expected, strict=True):
        assert torch.equal(a, b)


def test_another_resolution_compiles_nothing():
    from vitlinear.ops.triton import backward_kernels, forward_kernels

    kernels = (forward_kernels.forward_kernel, backward_kernels.backward_kernel)

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    run("mala", many_tokens("mala", 14, dim=32))
    before = compiled()
    for side in (10, 12, 15):
        run("mala", many_tokens("mala", side, dim=32))
    # Strides may be divisible by 16 or not; the number of tokens itself is no reason.
    assert all(b <= a + 1 for a, b in zip(before, compiled(), strict=True))


def test_measured_configurations(monkeypatch):
    """Tuning changes block sizes, not results."""
    from vitlinear.ops.triton import kept, tuning

    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(kept, "asked_for", "1")
    inputs = many_tokens("mala", 56, dim=32)
    expected = reference("mala", inputs)
    torch.use_deterministic_algorithms(False)
    out, grad = run("mala", inputs)
    assert any(key[0] != "fixed" for key in tuning._chosen)
    assert error(out, expected[0]) < 1e-2 and error(grad, expected[1]) < 1e-2


@pytest.mark.parametrize("mechanism", ["rala", "nala"])
def test_more_than_8_gib(mechanism):
    """Offsets beyond 2^32 elements."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    batch, side, heads, dim = 66, 128, 8, 128
    inputs = many_tokens(mechanism, side, batch=batch, heads=heads, dim=dim)
    assert inputs.projection.nbytes > 8 * 2**30
    out, grad = run(mechanism, inputs)
    for i in (0, batch - 1):
        alone = inputs._replace(
            projection=inputs.projection[i : i + 1].detach(), grad=inputs.grad[i : i + 1]
        )
        # Another number of samples, another number of splits.
        expected = run(mechanism, alone)
        assert error(out[i : i + 1], expected[0]) < 5e-3
        assert error(grad[i : i + 1], expected[1]) < 5e-3


@each_mechanism
@pytest.mark.parametrize("batch, heads", [(1, 1), (2, 4), (64, 4)])
def test_workspace(mechanism, batch, heads):
    """Memory that a pass holds at its worst, besides inputs, results and the saved states.

    A hundredth of the inputs, or two states for each processor if that is more.
    """
    side, dim = 128, 64
    torch.utils.deterministic.fill_uninitialized_memory = False
    inputs = many_tokens(mechanism, side, batch=batch, heads=heads, dim=dim)
    q, k, v, _ = inputs.projection.detach().unbind(2)
    options = (mechanism, *inputs.terms(mechanism).flatten())
    forward = torch.ops.vitlinear.linear_attention
    backward = torch.ops.vitlinear.linear_attention_backward
    out, *saved = forward(q, k, v, *options, "triton")
    backward(inputs.grad, q, k, v, *options, *saved, "triton")

    def most(call) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        del result
        return torch.cuda.max_memory_allocated() - before - kept

    states = sum(x.nbytes for x in saved if x is not None) / (batch * heads)
    states *= 2 * torch.cuda.get_device_properties(0).multi_processor_count + 2 * batch * heads
    allowed = max(0.01 * 4 * q.nbytes, states) + 2**20  # the allocator rounds up
    assert most(lambda: forward(q, k, v, *options, "triton")) <= allowed
    gradients = (inputs.grad, q, k, v, *options, *saved, "triton")
    assert most(lambda: backward(*gradients)) <= allowed
