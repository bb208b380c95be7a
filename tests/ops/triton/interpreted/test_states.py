"""States that are returned and states that are given, by the kernels, against eager in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.ops.checks import each_check
from tests.ops.inputs import make_inputs, powers_of
from tests.ops.triton.cases import ROUNDING, error, many_splits
from tests.pairwise import pairwise
from tests.parallel.ranks import Ranks
from vitlinear import ops
from vitlinear.layers.attention.band_attention import band_attention
from vitlinear.parallel import split_rows
from vitlinear.parallel.levels import plan_of

TERMS_OF_KEYS = ("rotary", "key_padding_mask", "powers")


def two_steps(tensors: dict[str, Tensor], options: dict, mechanism: str, backend: str) -> Tensor:
    """A state, and a read of it, with all terms that there are."""
    terms = options | {name: x for name, x in tensors.items() if name not in "qkv"}
    of_keys = {name: terms[name] for name in TERMS_OF_KEYS if name in terms}
    state = ops.linear_attention_state(
        tensors["k"], tensors["v"], mechanism=mechanism, **of_keys, backend=backend
    )
    return ops.read_linear_attention_state(
        tensors["q"], state, mechanism=mechanism, **terms, backend=backend
    )


def wide(x):
    """The same in float64."""
    if isinstance(x, ops.RotaryTables):
        return ops.RotaryTables(*map(wide, x))
    return x.detach().double() if x.is_floating_point() else x


def check(call, tensors, options, grad):
    """Output and gradients may err twice as much as those of eager in the same type."""

    def run(backend, convert):
        leaves = {name: convert(x).detach().requires_grad_() for name, x in tensors.items()}
        others = {name: convert(x) for name, x in options.items() if x is not None}
        out = call(leaves, others, backend)
        return [out, *torch.autograd.grad(out, [*leaves.values()], convert(grad))]

    found, plain = run("triton", lambda x: x), run("eager", lambda x: x)
    exact = run("eager", wide)
    names = ("output", *tensors)
    for name, actual, formula, expected in zip(names, found, plain, exact, strict=True):
        allowed = 2 * error(formula, expected) + ROUNDING[grad.dtype]
        assert actual.dtype == formula.dtype and error(actual, expected) <= allowed, name


@pytest.mark.parametrize(
    "mechanism, dtype, width, splits, more",
    [
        pytest.param("identity", torch.float32, 40, True, ("wide",), marks=pytest.mark.quick),
        ("identity", torch.bfloat16, 24, False, ("wide", "mask")),
        ("identity", torch.float16, 6, True, ("mask", "epilogue")),
        ("elu", torch.float32, 12, True, ("wide", "mask", "epilogue")),
        ("elu", torch.bfloat16, 20, False, ("lepe",)),
        ("mala", torch.float32, 6, True, ("mask", "epilogue")),
        ("mala", torch.float16, 12, False, ("wide",)),
        ("lightnet", torch.float32, 12, True, ("mask",)),
        ("pola", torch.float32, 6, True, ("mask", "epilogue")),
        ("identity", torch.float32, 40, True, ("mask", "slices")),
        ("mala", torch.float32, 40, False, ("epilogue", "slices")),
        ("pola", torch.float32, 40, True, ("slices",)),
        ("lightnet", torch.float32, 40, False, ("slices",)),
    ],
    ids=str,
)
def test_two_steps(mechanism, dtype, width, splits, more, monkeypatch):
    from vitlinear.ops.triton import calls, plan

    if "slices" in more:
        monkeypatch.setattr(plan, "LARGEST_STATE", 1024)
        monkeypatch.setattr(calls, "_prepared", {})
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(grid=(5, 9), dim=12, dtype=dtype, mask="mask" in more)
    q, k, *_ = inputs.projection.detach().unbind(2)
    generator = torch.Generator().manual_seed(1)
    v, lepe, gate, grad = torch.randn(4, 2, 45, 2, width, generator=generator).to(dtype)
    tensors = {"q": q, "k": k, "v": v}
    if "lepe" in more or "epilogue" in more:
        tensors["lepe"] = lepe
    if "epilogue" in more:
        tensors |= {"gate": gate, "head_scale": torch.tensor([-1.5, 0.5])}
    if ops.get_mechanism(mechanism).takes_powers:
        tensors["powers"] = powers_of(q)
    rotary = inputs.tables(mechanism)
    if "wide" in more:
        rotary = ops.full_width_rotary_tables(5, 9, 24)
    options = {"rotary": rotary, "key_padding_mask": inputs.mask}
    check(
        lambda tensors, others, backend: two_steps(tensors, others, mechanism, backend),
        tensors, options, grad,
    )  # fmt: skip


@pairwise(every=2, mechanism=["identity", "rala", "inline"], splits=[False, True])
def test_learned_state_that_samples_share(mechanism, splits, monkeypatch):
    """With what the mechanism does not read, whose gradient is zero."""
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(grid=(5, 9), dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    state, norm, mean = (
        torch.rand(1, 2, *shape, generator=generator).mT for shape in ((12, 8), (8, 1), (12, 1))
    )
    tensors = {"q": inputs.projection.detach()[:, :, 0], "state": state, "norm": norm}
    tensors["mean_v"] = mean
    grad = torch.randn(2, 45, 2, 12, generator=generator)

    def read(tensors, others, backend):
        q, *given = tensors.values()
        given = ops.LinearAttentionState(*given)
        unused = 0 * sum(x.sum() for x in given[:3])  # eager is given no zeros for it
        return unused + ops.read_linear_attention_state(
            q, given, mechanism=mechanism, **others, backend=backend
        )

    check(read, tensors, {"rotary": inputs.rotary}, grad)


@pairwise(every=2, mechanism=["identity", "mala", "lightnet"], largest=[16384, 512])
def test_gradients_of_a_state_itself(mechanism, largest, monkeypatch):
    """Of all that it holds, the logsumexp of a softmax over keys included."""
    from vitlinear.ops.triton import plan

    monkeypatch.setattr(plan, "LARGEST_STATE", largest)
    many_splits(monkeypatch)
    inputs = make_inputs(grid=(5, 9), dim=12, dtype=torch.float32, mask=True)
    _, k, *_ = inputs.projection.detach().unbind(2)
    v = torch.randn(2, 45, 2, 40, generator=torch.Generator().manual_seed(3))

    def call(tensors, others, backend):
        state = ops.linear_attention_state(
            **tensors, **others, mechanism=mechanism, backend=backend
        )
        return sum((x.sin() * x).sum() for x in state if x is not None)

    options = {"rotary": inputs.tables(mechanism), "key_padding_mask": inputs.mask}
    check(call, {"k": k, "v": v}, options, torch.tensor(1.0))


@each_check("mechanism", [("identity",), ("mala",), ("pola",)], traced=[("mala",)])
def test_opcheck(mechanism, checks):
    inputs = make_inputs(batch=1, dtype=torch.float32, mask=True, epilogue=("gate", "lepe"))
    q, k, v, *_ = inputs.projection.unbind(2)
    terms = inputs.terms(mechanism).flatten()
    arguments = (k, v, mechanism, *terms[:3], terms.powers, None, "triton")
    operators = torch.ops.vitlinear
    torch.library.opcheck(operators.linear_attention_state.default, arguments, test_utils=checks)
    state = operators.linear_attention_state(*arguments)
    given = ops.LinearAttentionState.unflatten(*(x.detach() for x in state))[:3]
    given = [None if x is None else x.requires_grad_() for x in given]
    arguments = (q, *given, mechanism, *terms[:-1], "triton")
    torch.library.opcheck(
        operators.read_linear_attention_state.default, arguments, test_utils=checks
    )


def test_failures_are_told(monkeypatch):
    """By name the kernels' error; else the formula, with a warning."""
    from vitlinear.ops import backend, triton

    def broken(*_):
        raise RuntimeError("no such instruction")

    for name in ("state_forward", "state_backward", "read_forward", "read_backward"):
        monkeypatch.setattr(triton, name, broken)
    monkeypatch.setattr(backend, "_failures", {})
    x = torch.randn(1, 6, 2, 8)
    state = torch.randn(1, 2, 8, 8)
    operators, given = torch.ops.vitlinear, (state, None, None)
    with pytest.raises(ops.KernelError, match="no such instruction"):
        ops.linear_attention_state(x, x, mechanism="identity", backend="triton")
    with pytest.raises(ops.KernelError, match="no such instruction"):
        operators.read_linear_attention_state(x, *given, "identity", backend="triton")
    with pytest.warns(UserWarning, match="kernels failed for identity, torch.float32"):
        found = operators.linear_attention_state(x, x, "identity", backend="auto")[0]
    leaf = x.clone().requires_grad_()
    out = operators.read_linear_attention_state(leaf, *given, "identity", backend="auto")
    torch.testing.assert_close(found, torch.einsum("bnhd,bnhe->bhde", x, x) / 6)
    torch.testing.assert_close(out, torch.einsum("bnhd,bhde->bnhe", x, state))
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    torch.testing.assert_close(grad, state.sum(-1).expand(6, -1, -1)[None])


def test_no_samples():
    x = torch.randn(0, 6, 2, 8, requires_grad=True)
    scale = torch.ones(2, requires_grad=True)
    state = ops.linear_attention_state(x, x, mechanism="mala", backend="triton")
    out = ops.read_linear_attention_state(
        x, state, mechanism="mala", head_scale=scale, backend="triton"
    )
    grad, of_scale = torch.autograd.grad(out.sum(), (x, scale))
    assert grad.shape == out.shape == x.shape and not of_scale.any()


@pytest.mark.parametrize("mask", [False, True])
def test_layer_of_vittt(mask, monkeypatch):
    """Its inner step is two reads of learned states and a state of tokens."""
    from vitlinear.layers.attention.ttt_attention import TttAttention

    many_splits(monkeypatch)
    torch.manual_seed(0)
    layers = {name: TttAttention(16, 2, backend=name) for name in ("triton", "eager")}
    layers["eager"].load_state_dict(layers["triton"].state_dict())
    layers["eager"].double()
    x, grad = torch.randn(2, 2, 5, 8, 16)
    padding = torch.zeros(2, 5, 8, dtype=torch.bool)
    padding[0, :, 5:] = True
    results = []
    for layer, dtype in zip(layers.values(), (torch.float32, torch.float64), strict=True):
        leaf = x.to(dtype).requires_grad_()
        rotary = ops.full_width_rotary_tables(5, 8, 16, dtype=dtype)
        out = layer(leaf, rotary, padding if mask else None)
        wanted = (leaf, *layer.parameters())
        results.append([out, *torch.autograd.grad(out, wanted, grad.to(dtype))])
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 3e-6


def _of_own_rows(mechanism: str, sizes: tuple[int, ...], width: int) -> dict[str, float]:
    """Errors of output and gradients of own rows, over those that are allowed."""
    height, heads, dim = sum(sizes), 2, 8
    generator = torch.Generator().manual_seed(0)
    shape = (2, height * width, heads, dim)
    q, k, v, lepe, gate, grad = torch.randn(6, *shape, generator=generator).unbind()
    tensors = {"q": q, "k": k, "v": v, "lepe": lepe, "gate": gate}
    make_tables = ops.lrpe_tables if mechanism == "lightnet" else ops.rotary_tables
    tables = make_tables(height, width, dim)

    def whole(convert):
        leaves = {name: convert(x).requires_grad_() for name, x in tensors.items()}
        out = ops.linear_attention(
            **leaves, mechanism=mechanism, rotary=wide(tables), backend="eager"
        )
        return [out, *torch.autograd.grad(out, [*leaves.values()], convert(grad))]

    exact = whole(lambda x: x.double())
    mesh = init_device_mesh("cpu", (len(sizes),), mesh_dim_names=("rows",))
    rows = split_rows(height, mesh, sizes=sizes)
    start, stop = rows.own

    def own(x):
        return x.unflatten(1, (height, width))[:, start:stop].flatten(1, 2)

    def parts(backend):
        leaves = {name: own(x).clone().requires_grad_() for name, x in tensors.items()}
        out = band_attention(
            rows.band(plan_of(()), 0),
            attn_type=mechanism,
            rotary=ops.RotaryTables(tables.rows[start:stop], tables.cols),
            backend=backend,
            **leaves,
        )
        return [out, *torch.autograd.grad(out, [*leaves.values()], own(grad))]

    found = {}
    names = ("output", *tensors)
    for name, ours, plain, expected in zip(
        names, parts("triton"), parts("eager"), map(own, exact), strict=True
    ):
        allowed = 2 * error(plain, expected) + ROUNDING[torch.float32]
        found[name] = error(ours, expected) / allowed
    return found


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.parametrize("mechanism", ["mala", "rala", "lightnet"])
def test_states_of_several_processes(mechanism, tmp_path):
    """Each has some rows; states are merged between the kernels, and their gradients after."""
    ranks = Ranks(2, str(tmp_path / "store"))
    try:
        for found in ranks.run(_of_own_rows, mechanism, (3, 2), 5):
            assert max(found.values()) <= 1, found
    finally:
        ranks.close()
