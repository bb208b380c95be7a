"""The 2-D rotary encoding: angles, both formulas, inverse."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests.golden import relative_error
from tests.ops.inputs import attend, make_inputs, oracle
from vitlinear import ops
from vitlinear.layers.attention import scriptable_state
from vitlinear.layers.positions import map_rotary
from vitlinear.ops.naive import rotate_tokens
from vitlinear.ops.rotary import rotate, token_table


def test_frequencies_include_both_ends():
    rows, cols = ops.rotary_tables(3, 4, 16, dtype=torch.float64)
    assert rows.shape == (3, 4, 2) and cols.shape == (4, 4, 2)
    expected = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4]).double()
    angles = torch.atan2(cols[1, :, 1], cols[1, :, 0])
    torch.testing.assert_close(angles, expected, rtol=1e-6, atol=0)


class AppleGpu(TorchFunctionMode):
    """Stands in for the device "mps", which this machine has not: tensors are on the CPU."""

    device = torch.device("mps")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        devices = [x for x in (*args, kwargs.get("device")) if isinstance(x, torch.device)]
        if self.device in devices:
            dtypes = kwargs.get("dtype"), *(x.dtype for x in args if torch.is_tensor(x))
            assert torch.float64 not in dtypes, "the device has no float64"
            args = [x for x in args if not isinstance(x, torch.device)]
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


@pytest.mark.parametrize("maker", [ops.rotary_tables, ops.lrpe_tables])
def test_tables_without_float64(maker):
    with AppleGpu():
        found = maker(3, 4, 16, AppleGpu.device)
    for table, expected in zip(found, maker(3, 4, 16), strict=True):
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)


def test_single_frequency_is_one():
    rows, _ = ops.rotary_tables(2, 2, 4, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(rows[1, 0], torch.stack((one.cos(), one.sin())))


@pytest.mark.quick
def test_rotation_matches_definition_and_inverts():
    tables = ops.rotary_tables(3, 5, 12, dtype=torch.float64)
    x = torch.randn(2, 15, 3, 12, dtype=torch.float64)
    heads_first = x.transpose(1, 2)
    table = token_table(tables)
    turned = rotate(heads_first, table)
    torch.testing.assert_close(turned.transpose(1, 2), rotate_tokens(x, tables))
    torch.testing.assert_close(rotate(turned, table, inverse=True), heads_first)


def turned_by_a_script(x: torch.Tensor, tables: ops.RotaryTables) -> torch.Tensor:
    return scriptable_state.turned(x, tables)


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("scale", [1e-8, 1e5])
def test_tokens_of_bfloat16_turn_by_tables_of_float16(scripted, scale):
    """GPUs have such tables; neither tokens nor gradients are rounded to their type."""
    tables = ops.rotary_tables(3, 5, 12, dtype=torch.float16)
    x = (scale * torch.randn(2, 15, 3, 12)).bfloat16().requires_grad_()
    grad = (scale * torch.randn(2, 15, 3, 12)).bfloat16()
    exact = x.detach().double().requires_grad_()
    expected = rotate_tokens(exact, ops.RotaryTables(*(table.double() for table in tables)))
    turn = torch.jit.script(turned_by_a_script) if scripted else scriptable_state.turned
    out = turn(x, tables)
    assert relative_error(out, expected) < 2**-8
    (found,) = torch.autograd.grad(out, x, grad)
    (expected,) = torch.autograd.grad(expected, exact, grad.double())
    assert relative_error(found, expected) < 2**-8


@pytest.mark.quick
@pytest.mark.parametrize("heads, dim", [(1, 8), (2, 8), (3, 12), (4, 6), (5, 4)])
def test_full_width_rotation_turns_heads_side_by_side(heads, dim):
    """The first half of all channels by the row, the second half by the column."""
    tables = ops.full_width_rotary_tables(3, 5, heads * dim, dtype=torch.float64)
    x = torch.randn(2, 15, heads, dim, dtype=torch.float64)
    row, col = torch.arange(15) // 5, torch.arange(15) % 5
    count = heads * dim // 4
    frequency = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    angle = torch.cat((row[:, None] * frequency, col[:, None] * frequency), dim=1)
    turns = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.reshape(2, 15, -1, 2))
    expected = torch.view_as_real(pairs * turns).reshape(x.shape)
    torch.testing.assert_close(rotate_tokens(x, tables), expected, rtol=1e-6, atol=1e-6)
    table = token_table(tables, heads)
    assert table.is_contiguous()
    turned = rotate(x.transpose(1, 2), table)
    torch.testing.assert_close(turned.transpose(1, 2), rotate_tokens(x, tables))
    torch.testing.assert_close(rotate(turned, table, inverse=True), x.transpose(1, 2))


def test_full_width_tables_are_float32_ones():
    """Whatever type they are kept in: angles of trained models were rounded."""
    rows, _ = ops.full_width_rotary_tables(300, 2, 64, dtype=torch.float64)
    frequency = 1 / (10000.0 ** (torch.arange(16, dtype=torch.float32) / 16))
    angle = torch.arange(300, dtype=torch.float32)[:, None] * frequency
    assert rows.dtype == torch.float64 and torch.equal(rows[..., 0], angle.cos().double())
    assert torch.equal(rows[..., 1], angle.sin().double())
    exact = torch.arange(300, dtype=torch.float64)[:, None] * frequency.double()
    assert not torch.equal(rows[..., 0], exact.cos())


@pytest.mark.parametrize("attention", ["elu", "nala", "softmax"])
@pytest.mark.parametrize("backend", ["eager", "library"])
@pytest.mark.parametrize("heads", [2, 3])
def test_attention_with_full_width_tables(attention, backend, heads):
    inputs = make_inputs(heads=heads, mask=True)
    tables = ops.full_width_rotary_tables(3, 5, 8 * heads, dtype=torch.float64)
    inputs = inputs._replace(rotary=tables)
    expected_out, expected_grad = oracle(attention, inputs)
    out = attend(attention, inputs, backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    assert relative_error(out, expected_out) < 1e-12
    assert relative_error(grad, expected_grad) < 1e-12


def test_pairs_of_channels_do_not_lie_in_two_heads():
    x = torch.randn(1, 6, 4, 3)
    with pytest.raises(ValueError, match="do not fit 4 heads of 3 channels"):
        ops.linear_attention(x, x, x, rotary=ops.full_width_rotary_tables(2, 3, 12))


class Rotate(torch.nn.Module):
    def forward(self, x, table, inverse):
        return rotate(x, table, inverse)


@pytest.mark.compile
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_compiled_and_exported_programs_equal_eager(inverse, heads):
    table = token_table(ops.rotary_tables(3, 5, 12 * heads, dtype=torch.float64), heads)
    x = torch.randn(2, 15, 3, 12, dtype=torch.float64).transpose(1, 2)
    expected = rotate(x, table, inverse)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table, inverse), expected)
    exported = torch.export.export(Rotate(), (x, table, inverse))
    torch.testing.assert_close(exported.module()(x, table, inverse), expected)
    names = {str(node.target) for node in exported.graph.nodes}
    assert not [name for name in names if "vitlinear" in name or "complex" in name]


@pytest.mark.compile
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_operator_of_compiled_programs(inverse, heads):
    table = token_table(ops.rotary_tables(3, 5, 12 * heads), heads)
    x = torch.randn(2, 15, 3, 12).transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.vitlinear.rotate, (x, table, inverse))
    grad = torch.randn(x.shape)
    (found,) = torch.autograd.grad(torch.ops.vitlinear.rotate(x, table, inverse), x, grad)
    torch.testing.assert_close(found, torch.autograd.grad(rotate(x, table, inverse), x, grad)[0])


@pytest.mark.parametrize("attention", ["softmax", "inline"])
def test_memory_that_starts_between_pairs(attention):
    x = torch.randn(2 * 6 * 8 + 1)[1:].view(2, 6, 1, 8)
    tables = ops.rotary_tables(2, 3, 8)

    def attend(x):
        if attention == "softmax":
            return ops.softmax_attention(x, x, x, rotary=tables)
        return ops.linear_attention(x, x, x, mechanism=attention, rotary=tables)

    assert x.is_contiguous() and torch.equal(attend(x), attend(x.clone()))


def test_scores_depend_on_the_offset_alone():
    tables = ops.rotary_tables(6, 6, 8, dtype=torch.float64)
    table = token_table(tables).unflatten(0, (6, 6))
    q, k = torch.randn(2, 1, 8, dtype=torch.float64).unbind(0)

    def score(a, b):
        return (rotate(q, table[a][None]) * rotate(k, table[b][None])).sum()

    torch.testing.assert_close(score((0, 1), (2, 4)), score((3, 2), (5, 5)))


def test_head_dim_must_divide_by_four():
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        ops.rotary_tables(2, 2, 6)
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        ops.full_width_rotary_tables(2, 2, 6)


@pytest.mark.compile
def test_gradient_of_learned_tables():
    """In compiled programs too, whose operator has none."""
    table = torch.randn(5, 4, 2, requires_grad=True)
    x = torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    results, expected = (
        torch.autograd.grad(run(x, table).square().sum() + run(x, table).sum(), (x, table))
        for run in (compiled, rotate)
    )
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("make", [ops.rotary_tables, ops.full_width_rotary_tables, ops.lrpe_tables])
def test_half_precision_rounds_tables_not_angles(make):
    exact, half = make(300, 200, 16), make(300, 200, 16, dtype=torch.float16)
    for of_axis, rounded in zip(exact, half, strict=True):
        assert torch.equal(of_axis.half(), rounded)


MAKERS = {
    "rotary": map_rotary.MapRotaryTables(16),
    "cosine": map_rotary.MapRotaryTables(16, cosine=True),
    "full width": map_rotary.MapFullWidthRotaryTables(),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("device", "dtype", "autocast", "expected"),
    [
        ("cuda", torch.bfloat16, None, torch.float16),
        ("cuda", torch.float32, torch.bfloat16, torch.float16),
        ("cuda", torch.float32, None, torch.float32),
        ("cuda", torch.float32, torch.float16, torch.float32),
        ("cuda", torch.float16, None, torch.float32),
        ("cuda", torch.float64, torch.bfloat16, torch.float64),
        ("cpu", torch.bfloat16, None, torch.float32),
        ("cpu", torch.float32, torch.bfloat16, torch.float32),
        ("cpu", torch.float64, None, torch.float64),
    ],
)
def test_layers_make_tables_as_kernels_read_them(maker, device, dtype, autocast, expected):
    """In bfloat16 on a GPU they have half of the bytes."""
    context = nullcontext()
    if autocast:
        with warnings.catch_warnings():  # that there is no GPU, which turns autocast off
            warnings.simplefilter("ignore")
            context = torch.autocast(device, autocast)
        context._enabled = True
    with FakeTensorMode(), context:
        x = torch.empty(1, 32, 5, 7, dtype=dtype, device=device)
        tables = MAKERS[maker](x)
    assert {table.dtype for table in tables} == {expected}
    assert {table.device.type for table in tables} == {device}
