"""Every backend of every attention against the float64 oracle, and what calls promise."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden import relative_error
from tests.ops.checks import each_gradcheck
from tests.ops.inputs import ATTENTIONS, BACKENDS, Inputs, attend, make_inputs, oracle
from tests.pairwise import pairwise, some_by_night
from vitlinear import ops
from vitlinear.ops import attention, naive, precision
from vitlinear.ops.rotary import RotaryTables
from vitlinear.ops.terms import Terms

# Root-mean-square error against the oracle, as a ratio, for outputs and gradients.
CEILING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

each_attention = pytest.mark.parametrize("attention", ATTENTIONS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def run(attention: str, inputs: Inputs, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    out = attend(attention, inputs, backend)
    return out, torch.autograd.grad(out, inputs.projection, inputs.grad)[0]


@pytest.mark.quick
@pairwise(
    attention=ATTENTIONS,
    backend=BACKENDS,
    mask=[False, True],
    rotary=[False, True],
    dtype=CEILING,
)
def test_matches_oracle(attention, backend, mask, rotary, dtype):
    inputs = make_inputs(grid=(5, 7), dim=12, dtype=dtype, rotary=rotary, mask=mask)
    out, grad = run(attention, inputs, backend)
    expected_out, expected_grad = oracle(attention, inputs)
    assert out.dtype == dtype and out.shape == inputs.grad.shape
    assert relative_error(out, expected_out) < CEILING[dtype]
    assert relative_error(grad, expected_grad) < CEILING[dtype]


@each_backend
@settings(deadline=None, max_examples=40)
@given(
    attention=st.sampled_from(ATTENTIONS),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    quads=st.integers(1, 8),
    rotary=st.booleans(),
    mask=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(backend, attention, grid, batch, heads, quads, rotary, mask, seed):
    mask = mask and grid[0] * grid[1] > 3  # leaves every sample a token
    inputs = make_inputs(
        grid=grid, batch=batch, heads=heads, dim=4 * quads, rotary=rotary, mask=mask, seed=seed
    )
    out, grad = run(attention, inputs, backend)
    expected_out, expected_grad = oracle(attention, inputs)
    # Outputs and gradients can vanish (no positive feature, one token), and a normaliser of the
    # size of its eps magnifies rounding a million times: compare with the size of the terms.
    scale = float(inputs.projection.detach().norm())
    assert float((out - expected_out).detach().norm()) < 1e-9 * scale
    scale = max(float(expected_grad.norm()), float(inputs.grad.norm()))
    assert float((grad - expected_grad).norm()) < 1e-9 * scale


class Wrapped(torch.Tensor):
    """Each result is another Python object, one that shares its memory with an input too."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result


@pairwise(
    attention=ATTENTIONS,
    backend=BACKENDS,
    mask=[False, True],
    heads=[1, 2],
    epilogue=[(), ("gate", "lepe")],
    memory=["views", "dense", "wrapped"],
)
def test_inference_writes_to_no_input(attention, backend, mask, heads, epilogue, memory):
    """It does to what it has made: dense inputs of one head are their own features at times."""
    inputs = make_inputs(grid=(3, 4), heads=heads, mask=mask, epilogue=epilogue)
    if memory != "views":
        terms = inputs.projection.detach().movedim(2, 0).contiguous()
        inputs = inputs._replace(projection=terms.movedim(0, 2))
    if memory == "wrapped":
        inputs = inputs._replace(projection=inputs.projection.as_subclass(Wrapped))
    before = inputs.projection.detach().clone()
    with torch.no_grad():
        out = attend(attention, inputs, backend)
    assert torch.equal(inputs.projection, before)
    assert relative_error(out, oracle(attention, inputs)[0]) < 1e-12


@pytest.mark.parametrize("attention", ops.MECHANISMS)
@pytest.mark.parametrize("batched", range(5))
def test_inference_of_many_by_vmap(attention, batched):
    inputs = make_inputs(epilogue=("gate", "lepe"))
    lepe, gate = inputs.epilogue_terms()
    powers = inputs.terms(attention).powers
    terms = [*inputs.projection.detach().unbind(2)[:3], lepe.detach(), gate.detach()]

    def run(term):
        q, k, v, *epilogue = *terms[:batched], term, *terms[batched + 1 :]
        lepe, gate = epilogue
        return ops.linear_attention(
            q, k, v, mechanism=attention, rotary=inputs.tables(attention), lepe=lepe, gate=gate,
            powers=powers, backend="eager",
        )  # fmt: skip

    many = torch.stack((terms[batched], -terms[batched]))
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(run)(many), torch.stack([*map(run, many)]))


@each_gradcheck(
    "attention, backend",
    product(ATTENTIONS, BACKENDS),
    slow=list(product(["rala", "pola"], BACKENDS)),
)
def test_gradcheck(attention, backend, fast):
    inputs = make_inputs(grid=(2, 3), dim=4, mask=True)
    assert torch.autograd.gradcheck(
        lambda projection: attend(attention, inputs, backend, projection),
        inputs.projection,
        fast_mode=fast,
    )


@each_attention
def test_eager_is_twice_differentiable(attention):
    # SDPA's fused kernel has no second derivative on CPUs; its plain form has.
    torch.manual_seed(0)  # gradgradcheck draws
    inputs = make_inputs(grid=(2, 2), heads=1, dim=4, batch=1)
    # Away from the kink of ReLU and from features that are all zero.
    inputs.projection.data.abs_().add_(0.1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(
            lambda projection: attend(attention, inputs, "eager", projection), inputs.projection
        )


@each_attention
def test_library_refuses_second_derivative(attention):
    inputs = make_inputs()
    out = attend(attention, inputs, "library")
    (grad,) = torch.autograd.grad(out.sum(), inputs.projection, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@pytest.mark.quick
@pairwise(
    attention=ATTENTIONS,
    backend=BACKENDS,
    layout=["channel-first", "transposed", "expanded", "odd", "strided-grad"],
)
def test_strides(attention, backend, layout):
    inputs = make_inputs(grid=(4, 4))
    expected_out, expected_grad = oracle(attention, inputs)
    base = inputs.projection.detach()
    if layout == "channel-first":  # [B, 4, h, D, N], as an NCHW map holds it
        base = base.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    elif layout == "transposed":  # [B, h, N, D] for each of q, k, v
        base = base.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    elif layout == "expanded":  # one sample seen twice, stride 0
        base = base[:1].expand(2, -1, -1, -1, -1)
        inputs = inputs._replace(projection=base, grad=inputs.grad)
        expected_out, expected_grad = oracle(attention, inputs)
    elif layout == "odd":  # pairs that do not lie as complex numbers do
        room = torch.zeros(*base.shape[:-1], base.shape[-1] + 1, dtype=base.dtype)
        base = room[..., 1:].copy_(base)
    grad = inputs.grad
    if layout == "strided-grad":
        grad = grad.transpose(1, 3).contiguous().transpose(1, 3)
    inputs = inputs._replace(projection=base.requires_grad_(), grad=grad)
    out, actual_grad = run(attention, inputs, backend)
    assert relative_error(out, expected_out) < 1e-12
    assert relative_error(actual_grad, expected_grad) < 1e-12


@each_attention
@each_backend
def test_padding_equals_cropping_whatever_it_holds(attention, backend):
    rows, kept = 5, 3
    inputs = make_inputs(grid=(rows, 4), batch=1)
    inside = torch.arange(rows * 4) < kept * 4
    projection = inputs.projection.detach().clone()
    projection[:, ~inside] = torch.nan
    projection.requires_grad_()
    padded = inputs._replace(projection=projection, mask=~inside[None])
    out, grad = run(attention, padded, backend)

    cropped = Inputs(
        inputs.projection.detach()[:, inside].requires_grad_(),
        ops.rotary_tables(kept, 4, 8, dtype=torch.float64),
        None,
        inputs.grad[:, inside],
        ops.lrpe_tables(kept, 4, 8, dtype=torch.float64),
    )
    expected_out, expected_grad = run(attention, cropped, backend)
    torch.testing.assert_close(out[:, inside], expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad[:, inside], expected_grad, rtol=1e-12, atol=1e-12)
    assert not out[:, ~inside].any() and not grad[:, ~inside].any()


@each_attention
@each_backend
def test_sample_of_padding_alone_gives_zero(attention, backend):
    inputs = make_inputs(mask=True)
    inputs.mask[0] = True
    out, grad = run(attention, inputs, backend)
    assert not out[0].any() and not grad[0].any()
    assert out[1].any() and grad.isfinite().all()


@each_attention
@each_backend
def test_samples_do_not_see_each_other(attention, backend):
    inputs = make_inputs(batch=3)
    out = attend(attention, inputs, backend)
    for i in range(3):
        alone = attend(attention, inputs, backend, inputs.projection[i : i + 1])
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-13, atol=1e-13)


@each_attention
@each_backend
def test_tokens_may_be_permuted_without_rotary(attention, backend):
    inputs = make_inputs(rotary=False)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    out = attend(attention, inputs, backend)
    permuted = attend(attention, inputs, backend, inputs.projection[:, order])
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-12, atol=1e-12)


def test_attention_without_rotary_is_an_average():
    """Weights are positive and, but for eps, sum to one."""
    inputs = make_inputs(rotary=False)
    q, k, _, _ = inputs.projection.unbind(2)
    for mechanism in ("rala", "elu"):
        weights = naive.linear_attention_weights(q, k, mechanism)
        assert (weights > 0).all()
        torch.testing.assert_close(
            weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=1e-5, atol=1e-5
        )


@pairwise(
    mechanism=ops.MECHANISMS,
    backend=BACKENDS,
    dtype=[torch.float16, torch.bfloat16, torch.float32],
    case=[
        "zero queries", "constant keys", "vanishing normaliser", "large", "huge", "zeros", "alone",
    ],
)  # fmt: skip
def test_finite(mechanism, backend, dtype, case):
    """The numerics contract: finite outputs and gradients at |v| up to 1e3."""
    inputs = make_inputs(grid=(1, 1) if case == "alone" else (8, 9), dim=16, dtype=dtype)
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
    inputs = inputs._replace(projection=projection.requires_grad_())
    out, grad = run(mechanism, inputs, backend)
    assert out.isfinite().all() and grad.isfinite().all()


# float16, whose range sums leave, of all mechanisms; the other types of two each.
@some_by_night(
    "mechanism, dtype",
    list(product(ops.MECHANISMS, [torch.float16, torch.float32, torch.bfloat16])),
    [
        *product(ops.MECHANISMS, [torch.float16]),
        *product(["rala", "pola"], [torch.float32]),
        *product(["mala", "l2"], [torch.bfloat16]),
    ],
)
def test_many_tokens(mechanism, dtype):
    """Sums over 2^17 tokens stay as exact as over few: float16 ends at 65504.

    Against the float64 eager formula, which other tests hold to the oracle: a matrix of all pairs
    of tokens would not fit here.
    """
    double = make_inputs(grid=(256, 512), batch=1, heads=1, dim=16)
    inputs = double._replace(
        projection=double.projection.detach().to(dtype).requires_grad_(),
        grad=double.grad.to(dtype),
        rotary=RotaryTables(*(table.float() for table in double.rotary)),
        cosine=RotaryTables(*(table.float() for table in double.cosine)),
    )
    double = double._replace(
        projection=inputs.projection.detach().double().requires_grad_(), grad=inputs.grad.double()
    )
    expected_out, expected_grad = run(mechanism, double, "eager")
    for backend in BACKENDS:
        out, grad = run(mechanism, inputs, backend)
        assert relative_error(out, expected_out) < CEILING[dtype], backend
        assert relative_error(grad, expected_grad) < CEILING[dtype], backend


@each_attention
@each_backend
def test_repeats_are_bit_equal(attention, backend):
    inputs = make_inputs(grid=(16, 16), dtype=torch.float32)
    first = run(attention, inputs, backend)
    for _ in range(2):
        for a, b in zip(run(attention, inputs, backend), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mechanism", ["rala", "mala", "elu", "relu"])
@each_backend
def test_rotation_over_a_vanishing_normaliser_saturates(mechanism, backend):
    """Rotation can leave a large numerator over a vanishing normaliser: no infinity comes out."""
    inputs = make_inputs(grid=(4, 4), dim=16, dtype=torch.float16)
    projection = inputs.projection.detach()
    projection[:, :, :2] = -12
    projection[:, :, 0, :, 0] = 10
    projection[:, :, 1, :, 1] = 10
    projection = projection.requires_grad_()
    expected, _ = oracle(mechanism, inputs._replace(projection=projection))
    assert expected.abs().max() > 65504
    out = attend(mechanism, inputs, backend, projection)
    assert out.isfinite().all() and out.abs().max() == 65504


@pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
@each_backend
def test_float16_saturates(mechanism, backend):
    """Outputs and gradients beyond float16 are its largest number, not infinity."""
    inputs = make_inputs(grid=(4, 4), dim=16, dtype=torch.float16)
    inputs = inputs._replace(head_scale=torch.full((2,), 1e7))
    out, grad = run(mechanism, inputs, backend)
    expected_out, expected_grad = oracle(mechanism, inputs)
    for actual, expected in ((out, expected_out), (grad, expected_grad)):
        assert expected.abs().max() > 65504
        assert actual.isfinite().all() and actual.abs().max() == 65504


@each_backend
def test_gradient_of_a_float16_head_scale_saturates(backend):
    scale = torch.ones(2, dtype=torch.float16, requires_grad=True)
    inputs = make_inputs(dtype=torch.float16)._replace(head_scale=scale)
    out = attend("mala", inputs, backend)
    (grad,) = torch.autograd.grad(out, scale, 60000 * out.detach().sign())
    assert grad.tolist() == [65504.0, 65504.0]


@pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
@each_backend
@pytest.mark.parametrize("mask", [False, True], ids=["full", "padded"])
def test_head_scale(mechanism, backend, mask):
    """tau multiplies the state, one number for each head, and learns."""
    inputs = make_inputs(heads=3, mask=mask)
    scale = torch.tensor([0.2, 1.0, -1.5], dtype=torch.float64, requires_grad=True)
    inputs = inputs._replace(head_scale=scale)
    out = attend(mechanism, inputs, backend)
    grads = torch.autograd.grad(out, (inputs.projection, scale), inputs.grad)
    expected = attend(mechanism, inputs, "naive")
    expected_grads = torch.autograd.grad(expected, (inputs.projection, scale), inputs.grad)
    assert relative_error(out, expected) < 1e-12
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) < 1e-12


@pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_library_is_as_exact_as_eager(mechanism, scale):
    """Also where one key has all the weight and its gradient is what cancellation leaves."""
    inputs = make_inputs(grid=(12, 12), dim=16, dtype=torch.float32, scale=scale)
    expected = oracle(mechanism, inputs)
    eager, library = (run(mechanism, inputs, backend) for backend in BACKENDS)
    for result, plain, exact in zip(library, eager, expected, strict=True):
        assert relative_error(result, exact) <= 2 * relative_error(plain, exact) + 1e-7


@each_attention
def test_library_refuses_forward_mode(attention):
    inputs = make_inputs()
    tangent = torch.ones_like(inputs.projection)

    def call(backend):
        return torch.func.jvp(
            lambda p: attend(attention, inputs, backend, p),
            (inputs.projection.detach(),),
            (tangent.detach(),),
        )[1]

    with pytest.raises(NotImplementedError, match="forward-mode derivative; use backend='eager'"):
        call("library")
    if attention != "softmax":
        step = 1e-6
        ahead, behind = (
            attend(attention, inputs, "eager", inputs.projection.detach() + s * step)
            for s in (1, -1)
        )
        torch.testing.assert_close(
            call("eager"), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7
        )


def test_gradient_of_rotary_tables():
    inputs = make_inputs()
    tables = ops.RotaryTables(*(table.requires_grad_() for table in inputs.rotary))
    inputs = inputs._replace(rotary=tables)
    (grad,) = torch.autograd.grad(attend("rala", inputs, "eager").square().sum(), tables.rows)
    assert grad.any()
    with pytest.raises(NotImplementedError, match="no gradient of rotary tables"):
        attend("rala", inputs, "library")


@each_attention
@each_backend
def test_autocast_keeps_the_type_of_the_inputs(attention, backend):
    inputs = make_inputs(grid=(4, 4), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(attention, inputs, backend)
    assert torch.equal(out, attend(attention, inputs, backend))


@each_attention
@each_backend
def test_autocast_leaves_states_alone(attention, backend):
    """Half precision comes in and goes out; the sums between stay float32."""
    inputs = make_inputs(grid=(16, 16), dtype=torch.bfloat16)
    plain_out, plain_grad = run(attention, inputs, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(attention, inputs, backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain_out) and torch.equal(grad, plain_grad)


@each_attention
@each_backend
def test_meta(attention, backend):
    inputs = make_inputs(mask=True)
    inputs = Inputs(
        inputs.projection.detach().to("meta").requires_grad_(),
        ops.RotaryTables(*(table.to("meta") for table in inputs.rotary)),
        inputs.mask.to("meta"),
        inputs.grad.to("meta"),
        ops.RotaryTables(*(table.to("meta") for table in inputs.cosine)),
    )
    out, grad = run(attention, inputs, backend)
    assert out.is_meta and out.shape == inputs.grad.shape
    assert grad.is_meta and grad.shape == inputs.projection.shape


@each_attention
@each_backend
def test_empty_batch(attention, backend):
    inputs = make_inputs(batch=2)
    out = attend(attention, inputs, backend, inputs.projection[:0])
    assert out.shape == (0, *inputs.grad.shape[1:])
    assert not torch.autograd.grad(out.sum(), inputs.projection)[0].any()


BAD_INPUT = {
    "q, k and v must be [B, N, h, D]": {"q": torch.zeros(2, 6, 8)},
    "one shape": {"k": torch.zeros(2, 5, 2, 8)},
    "one floating-point type": {"v": torch.zeros(2, 6, 2, 8, dtype=torch.float64)},
    "4 x 2 grid do not fit 6 tokens": {"rotary": ops.rotary_tables(4, 2, 8)},
    "must be RotaryTables, as rotary_tables and its likes make them, got tuple": {
        "rotary": tuple(ops.rotary_tables(3, 2, 8))
    },
    "do not fit 2 heads of 8 channels": {"rotary": ops.rotary_tables(3, 2, 32)},
    "at least one token": dict.fromkeys("qkv", torch.zeros(2, 0, 2, 8)),
    "must both be float32, float64 or float16, got torch.bfloat16": {
        "rotary": ops.rotary_tables(3, 2, 8, dtype=torch.bfloat16)
    },
    "must be bool": {"key_padding_mask": torch.zeros(2, 6)},
    "must be [B, N] = (2, 6)": {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)},
    "unknown backend 'cuda'; choose from: auto, eager, library": {"backend": "cuda"},
    "unknown attention mechanism 'mla'; choose from: rala": {"mechanism": "mla"},
    "one entry for each of 2 heads, got shape (3,)": {"head_scale": torch.ones(3)},
    "make them with lrpe_tables": {
        "mechanism": "lightnet",
        "rotary": ops.rotary_tables(3, 2, 8),
    },
}


@pytest.mark.quick
@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_named(message):
    arguments = dict.fromkeys("qkv", torch.zeros(2, 6, 2, 8)) | BAD_INPUT[message]
    with pytest.raises(ValueError) as caught:
        ops.linear_attention(**arguments)
    assert message in str(caught.value)
    if not {"mechanism", "head_scale"} & arguments.keys():
        with pytest.raises(ValueError) as caught:
            ops.softmax_attention(**arguments)
        assert message in str(caught.value)


@pytest.mark.parametrize("place", ["k", "v", "key_padding_mask", "head_scale", "gate", "rows"])
def test_tensors_on_another_device_are_named(place):
    """Kernels would read another GPU's memory, or fail."""
    q, tables = torch.randn(1, 6, 2, 8), ops.rotary_tables(2, 3, 8)
    given = {
        "k": q.clone(), "v": q.clone(), "key_padding_mask": torch.zeros(1, 6, dtype=torch.bool),
        "head_scale": torch.ones(2), "gate": q.clone(), "rows": tables.rows,
    }  # fmt: skip

    def attend(given):
        rows = given["rows"]
        rest = {key: given[key] for key in ("key_padding_mask", "head_scale", "gate")}
        return ops.linear_attention(
            q, given["k"], given["v"], rotary=RotaryTables(rows, tables.cols), **rest
        )

    elsewhere = given | {place: given[place].to("meta")}
    message = f"{place} must be on the device of q, cpu, and is on meta"
    with pytest.raises(ValueError, match=message):
        attend(elsewhere)


def test_signs_that_are_not_in_memory_yet():
    numbers = torch.randn(1, 6, 2, 8, dtype=torch.cfloat)
    q = numbers.conj().imag
    assert q.is_neg() and attention.known(q, q, q, "elu", Terms()) is None
    state = ops.linear_attention_state(q, q, backend="library")
    out = ops.linear_attention(q, q, q, gate=q, backend="library")
    plain = q.resolve_neg()
    torch.testing.assert_close(out, ops.linear_attention(plain, plain, plain, gate=plain))
    torch.testing.assert_close(state.state, ops.linear_attention_state(plain, plain).state)


SETTINGS = {
    "cuda.matmul": lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value),
    "mkldnn.matmul": lambda value: setattr(torch.backends.mkldnn.matmul, "fp32_precision", value),
    "all": lambda value: setattr(torch.backends, "fp32_precision", value),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_any_setting_of_float32_products(setting):
    """PyTorch's older getter raises an error after the newer setters."""
    q = torch.randn(1, 6, 2, 8)
    try:
        SETTINGS[setting]("tf32")
        out = ops.linear_attention(q, q, q)
        state = ops.linear_attention_state(q, q)
        ops.read_linear_attention_state(q, state)
        assert precision.takes_tf32() == (setting != "mkldnn.matmul")
        compiled = torch.compile(ops.linear_attention, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(q, q, q), out)
    finally:
        SETTINGS[setting]("none")
    assert not precision.takes_tf32()


@pytest.mark.quick
@each_attention
@each_backend
def test_valid_lengths_are_a_mask(attention, backend):
    inputs = make_inputs(grid=(3, 5))
    lengths = torch.tensor([15, 4])
    mask = torch.arange(15) >= lengths[:, None]
    expected = run(attention, inputs._replace(mask=mask), backend)
    for a, b in zip(run(attention, inputs._replace(mask=lengths), backend), expected, strict=True):
        assert torch.equal(a, b)
