"""The linear map that CPUs run through oneDNN."""

from __future__ import annotations

import copy
import ctypes
import io
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.onednn import needs_onednn, operators
from vitlinear.layers import Linear
from vitlinear.ops.cpu import products as module
from vitlinear.ops.cpu.products import (
    MATMUL_ROWS,
    PACK_ROWS,
    linear,
    matmul,
    runs_on_onednn,
)

# Rows of a projection, of one token, of a map, of a view with gaps, of a transposed view.
INPUTS = {
    "rows": lambda: torch.randn(7, 24),
    "token": lambda: torch.randn(1, 24),
    "map": lambda: torch.randn(2, 5, 3, 24),
    "gaps": lambda: torch.randn(2, 5, 3, 48)[..., ::2],
    "transposed": lambda: torch.randn(2, 24, 5, 3).permute(0, 2, 3, 1),
    "expanded": lambda: torch.randn(1, 1, 24).expand(3, 2, 24),
}


@pytest.fixture(autouse=True, params=[False, True], ids=["other", "mkl keeps up"])
def keeps_up(request, monkeypatch):
    """Both kinds of processor, wherever this runs."""
    monkeypatch.setattr(module, "MKL_KEEPS_UP", request.param)
    return request.param


def layer(bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(24, 40, bias=bias)


@pytest.mark.compile
@needs_onednn
@torch.no_grad()
def test_weights_that_widen_are_packed_for_many_rows(keeps_up):
    def packed(rows: int, weight: torch.Tensor) -> bool:
        x, bias = torch.randn(2, rows // 2, weight.shape[1]), torch.randn(len(weight))
        ran = operators(lambda: linear(x, weight, bias))
        expected = F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
        return "mkldnn::_reorder_linear_weight" in ran

    torch.manual_seed(0)
    assert packed(PACK_ROWS, torch.randn(40, 24)) != keeps_up
    assert packed(PACK_ROWS, torch.randn(24, 40).t()) != keeps_up
    assert not packed(PACK_ROWS, torch.randn(24, 40))
    assert not packed(PACK_ROWS - 2, torch.randn(40, 24))


@needs_onednn
@torch.no_grad()
def test_frozen_weights_are_packed_once():
    ours = layer().fuse()
    packs = "mkldnn::_reorder_linear_weight"
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(3, 7, 24)
    assert packs in operators(lambda: compiled(x))
    for call in (ours, compiled):
        for rows in (1, 7, 5000):
            x = torch.randn(3, rows, 24)
            ran = operators(lambda: call(x))  # noqa: B023
            assert packs not in ran
            assert "mkldnn::_linear_pointwise" in ran
            expected = F.linear(x.double(), ours.weight.double(), ours.bias.double())
            torch.testing.assert_close(call(x).double(), expected, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        assert ours(x.requires_grad_()).requires_grad


def written_to(weight: nn.Parameter, other: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Every way to change a weight that somebody thought of; most leave its version as it is."""
    layer = nn.Linear(24, 40)
    layer.weight = weight

    def step(optimizer: type[torch.optim.Optimizer], **kwargs: object) -> None:
        weight.grad = weight.detach() - other
        optimizer([weight], lr=1.0, fused=True, **kwargs).step()

    def exchange() -> None:
        weight.data = torch.empty(0)  # its memory is free for what comes next
        weight.data = other.clone()

    def convert() -> None:
        layer.double()
        weight.data = other.double()
        layer.float()

    def swap() -> None:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            layer.double()
            with torch.no_grad():
                weight.copy_(other)
            layer.float()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    def share() -> None:
        weight.share_memory_()
        context = torch.multiprocessing.get_context("fork")
        process = context.Process(target=weight.detach().copy_, args=(other,))
        process.start()
        process.join()

    return {
        "in place": lambda: weight.detach().copy_(other),
        "loaded": lambda: layer.load_state_dict({"weight": other, "bias": layer.bias}),
        "data": lambda: weight.data.copy_(other),
        "exchanged": exchange,
        "converted": convert,
        "swapped": swap,
        "numpy": lambda: np.copyto(weight.detach().numpy(), other.numpy()),
        "array": lambda: np.copyto(np.asarray(weight.detach()), other.numpy()),
        "dlpack": lambda: torch.from_dlpack(weight.detach()).copy_(other),
        "address": lambda: ctypes.memmove(weight.data_ptr(), other.data_ptr(), 4 * 40 * 24),
        "storage": lambda: weight.untyped_storage().copy_(other.untyped_storage()),
        "vector": lambda: nn.utils.vector_to_parameters(other.flatten(), [weight]),
        "fused SGD": lambda: step(torch.optim.SGD),
        "fused AdamW": lambda: step(torch.optim.AdamW, weight_decay=0.0),
        "another process": share,
    }


def fused_and_used() -> tuple[Linear, torch.Tensor]:
    """A layer that has its packed weight, and an input."""
    ours, x = layer().fuse(), torch.randn(7, 24)
    with torch.no_grad():
        ours(x)
    assert module._packed(ours.weight) is not None
    return ours, x


@needs_onednn
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", written_to(layer().weight, torch.zeros(0)))
def test_frozen_weights_that_change_all_the_same(change, inference):
    with torch.inference_mode(inference):
        other = torch.randn(40, 24)
    if inference and change in ("fused SGD", "fused AdamW", "swapped"):
        pytest.skip("is no change that inference mode allows")
    ours, x = fused_and_used()
    before = ours.weight.clone()
    for _ in range(2):
        written_to(ours.weight, other)[change]()
        with torch.no_grad():
            expected = F.linear(x, ours.weight, ours.bias)
            torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours.weight, before)
        other = other + 1


@needs_onednn
@torch.no_grad()
def test_arrays_that_share_the_memory_of_a_weight():
    """From before it is packed, and from outside: while there are some, it is not packed."""
    ours, x = layer().fuse(), torch.randn(7, 24)
    array = ours.weight.detach().numpy()
    ours(x)
    for _ in range(2):
        assert module._packed(ours.weight) is None
        array += 1
        torch.testing.assert_close(
            ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5
        )
    del array
    assert module._packed(ours.weight) is not None
    array = np.ones((40, 24), np.float32)
    ours.weight = nn.Parameter(torch.from_numpy(array))
    for _ in range(2):
        array += 1
        assert module._packed(ours.weight) is None
        torch.testing.assert_close(
            ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5
        )


@needs_onednn
@torch.no_grad()
def test_transposed_in_place():
    ours = Linear(24, 24).fuse()
    x = torch.randn(7, 24)
    ours(x)
    ours.weight.t_()
    torch.testing.assert_close(ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5)


@needs_onednn
@torch.no_grad()
def test_copies_and_files_of_packed_weights():
    ours, x = fused_and_used()
    file = io.BytesIO()
    torch.save(ours, file)
    assert file.tell() < 3 * 4 * 40 * 24
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        other.weight += 1
        expected = F.linear(x, other.weight, other.bias)
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)
        assert module._packed(other.weight) is not None
    torch.testing.assert_close(ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_frozen_weights_that_are_trained_all_the_same(optimizer):
    """With passes without gradients everywhere between."""
    ours, x = fused_and_used()
    theirs = nn.Linear(24, 40)
    theirs.load_state_dict(ours.state_dict())
    steps = [optimizer(each.parameters(), lr=0.1, fused=True) for each in (ours, theirs)]

    def same() -> None:
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)

    for _ in range(3):
        losses = [each(x).square().sum() for each in (ours, theirs)]
        same()
        for loss, step in zip(losses, steps, strict=True):
            step.zero_grad()
            loss.backward()
        same()
        for step in steps:
            step.step()
        same()


@needs_onednn
def test_threads_that_pack_and_threads_that_do_not():
    """Each sees the weight, whoever takes its memory."""
    ours, x = layer().fuse(), torch.randn(7, 24)
    expected, failed = F.linear(x, ours.weight, ours.bias), []

    def run(grad: bool) -> None:
        with torch.set_grad_enabled(grad):
            for _ in range(200):
                if not torch.allclose(ours(x), expected, rtol=1e-5, atol=1e-5):
                    failed.append(grad)

    threads = [threading.Thread(target=run, args=(grad,)) for grad in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@needs_onednn
def test_no_product_takes_memory_from_other_threads():
    """Which may read it at that moment, packed or not."""
    ours, x = fused_and_used()
    kept = ours.weight.untyped_storage()._vitlinear_packed
    address = torch._C._data_address(ours.weight)

    def untouched() -> bool:
        return torch._C._data_address(ours.weight) == address and kept.fits(ours.weight)

    expected = F.linear(x, ours.weight, ours.bias)
    x.requires_grad_()
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    assert untouched()
    (grad,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(grad, 2 * expected @ ours.weight, rtol=1e-5, atol=1e-5)
    assert untouched()
    grad.sum().backward()
    assert untouched()
    for call in (torch.no_grad(), torch.enable_grad()):
        with call:
            part = ours.some(x, 8, 16)
            torch.testing.assert_close(part, expected[:, 8:16], rtol=1e-5, atol=1e-5)
            assert untouched()
            linear(x, ours.weight, ours.bias)  # as a layer that shares the weight
            assert untouched()


@needs_onednn
@torch.no_grad()
def test_packed_weights_live_no_longer_than_weights():
    ours, _ = fused_and_used()
    storage = ours.weight.untyped_storage()
    kept = weakref.ref(storage._vitlinear_packed.weight)
    del storage
    assert kept() is not None
    del ours
    assert kept() is None


@needs_onednn
@pytest.mark.parametrize("batch", [1, 3])
def test_matrix_products_by_onednn_where_no_gradient_is_wanted(batch, keeps_up):
    # Heads before tokens, as views of tokens before heads.
    x, y = torch.randn(batch, MATMUL_ROWS, 2, 12).transpose(1, 2), torch.randn(batch, 2, 12, 20)
    used = "mkldnn::_linear_pointwise"
    assert used not in operators(lambda: matmul(x, y))  # gradients are enabled
    with torch.no_grad():
        for case in (x, x[:, :1], x[:1, 1:]):
            weight = y[: case.shape[0], : case.shape[1]]
            torch.testing.assert_close(
                matmul(case, weight).double(), case.double() @ weight.double(), rtol=1e-5, atol=1e-5
            )
            assert (used in operators(lambda: matmul(case, weight))) != keeps_up  # noqa: B023
        assert used not in operators(lambda: matmul(x[:, :, 1:], y))
        assert used not in operators(lambda: matmul(x.double(), y.double()))
        assert used not in operators(lambda: matmul(x[:0], y[:0]))
        assert matmul(x[:0], y[:0]).shape == (0, 2, MATMUL_ROWS, 20)


@pytest.mark.compile
@needs_onednn
@torch.no_grad()
def test_one_compiled_program_of_matrix_products_for_short_and_long(keeps_up):
    compiled = torch.compile(matmul, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (50, MATMUL_ROWS + 7, MATMUL_ROWS - 1):
            x, y = torch.randn(3, 2, rows, 12), torch.randn(3, 2, 12, 20)
            torch.testing.assert_close(compiled(x, y), matmul(x, y), rtol=1e-5, atol=1e-5)
            used = "mkldnn::_linear_pointwise" in operators(lambda: compiled(x, y))  # noqa: B023
            assert used == (rows >= MATMUL_ROWS and not keeps_up)
    with FlopCounterMode(display=False) as ours:
        torch.ops.vitlinear.matmul(x, y)
    with FlopCounterMode(display=False) as theirs:
        torch.matmul(x, y)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


@pytest.mark.quick
@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_outputs_and_gradients(name, bias):
    ours = layer(bias)
    theirs = copy.deepcopy(ours).double()
    x = INPUTS[name]().requires_grad_()
    wide = x.detach().double().requires_grad_()
    assert runs_on_onednn(x, ours.weight)
    out, expected = ours(x), F.linear(wide, theirs.weight, theirs.bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), out, rtol=1e-6, atol=1e-6)
    grad = torch.randn_like(out)
    results = torch.autograd.grad(out, [x, *ours.parameters()], grad)
    oracles = torch.autograd.grad(expected, [wide, *theirs.parameters()], grad.double())
    for result, oracle in zip(results, oracles, strict=True):
        torch.testing.assert_close(result.double(), oracle, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", ["gaps", "expanded"])
def test_biases_with_strides(bias, grad):
    """oneDNN reads them as if there were none."""
    ours, x = layer(), torch.randn(7, 24)
    values = torch.randn(80)[::2] if bias == "gaps" else torch.randn(1).expand(40)
    ours.bias = nn.Parameter(values)
    assert runs_on_onednn(x, ours.weight) and not ours.bias.is_contiguous()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(
            ours(x), F.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5
        )


def test_what_does_not_fit_is_told_as_pytorch_tells_it():
    ours = layer()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        ours(torch.randn(7, 25))
    with pytest.raises(RuntimeError, match=r"size of tensor|expand"):
        linear(torch.randn(7, 24), ours.weight, torch.randn(39))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(7, 24), ours.weight, torch.randn(40).double())
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="meta"):
            layer().to("meta")(torch.randn(7, 24))


@needs_onednn
def test_gradients_keep_what_they_need():
    """And no more: what a frozen weight saw may be written to."""
    x, ours = torch.randn(7, 24, requires_grad=True), layer().requires_grad_(False)
    seen = x * 1
    out = ours(seen)
    seen.mul_(2)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), x)[0], ours.weight.sum(0).expand(7, 24), rtol=1e-5, atol=1e-5
    )
    ours.requires_grad_()
    out = ours(torch.ones(7, 24))
    with torch.no_grad():
        ours.weight.mul_(2)
    assert (torch.autograd.grad(out.sum(), ours.weight)[0] == 7).all()


@needs_onednn
def test_many_gradients_at_once():
    ours = layer()

    def gradients(vectorized):
        x = torch.linspace(-1, 1, 48).view(2, 24)
        return torch.autograd.functional.jacobian(
            lambda x, w, b: linear(x, w, b),
            (x, ours.weight.detach(), ours.bias.detach()),
            vectorize=vectorized,
        )

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_weight_gradients(keeps_up):
    ours, x = layer(), torch.randn(7, 24)
    out = ours(x)
    ran = operators(lambda: torch.autograd.grad(out.sum(), ours.weight))
    assert ("aten::mm" in ran, "mkldnn::_linear_pointwise" in ran) == (keeps_up, not keeps_up)


@needs_onednn
def test_derivatives_of_higher_order():
    ours = layer()
    theirs = copy.deepcopy(ours).double()
    # Small: of a saturated tanh little more than rounding is left in second derivatives.
    x, direction = torch.randn(2, 6, 24) / 4

    def second(module, dtype):
        y = x.to(dtype).requires_grad_()
        weights = [y, module.weight]
        loss = module(y).tanh().sum()
        first = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights)

    def forward_mode(module, dtype):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.to(dtype), direction.to(dtype))
            return [forward_ad.unpack_dual(module(dual)).tangent]

    assert runs_on_onednn(x, ours.weight)
    for derivative in (second, forward_mode):
        results, oracles = derivative(ours, torch.float32), derivative(theirs, torch.float64)
        for result, oracle in zip(results, oracles, strict=True):
            torch.testing.assert_close(result.double(), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("found", "keeps_up"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, False),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, True),
        ({"cpu_name": None}, False),
    ],
)
def test_processors_on_which_mkl_keeps_up(found, keeps_up, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert module.mkl_keeps_up() == keeps_up
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not module.mkl_keeps_up()


@pytest.mark.quick
@needs_onednn
def test_which_library():
    ours, x = layer(), torch.randn(7, 24)
    assert "mkldnn::_linear_pointwise" in operators(lambda: ours(x))
    assert "mkldnn::_linear_pointwise" not in operators(lambda: ours.double()(x.double()))
    ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert ours(x[:0]).shape == (0, 40)
    torch.backends.mkldnn.enabled = False
    try:
        assert "mkldnn::_linear_pointwise" not in operators(lambda: ours(x))
    finally:
        torch.backends.mkldnn.enabled = True


def test_programs_for_other_places_have_common_operators_only():
    ours, x = layer(), torch.randn(7, 24)
    program = torch.export.export(ours, (x,))
    assert "mkldnn" not in str(program.graph)
    assert "mkldnn" not in str(torch.jit.trace(ours, x).graph)
    for mode in ("real", "fake"):
        noted = make_fx(ours, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        assert "mkldnn" not in str(noted.graph)
    assert not runs_on_onednn(FakeTensorMode().from_tensor(x), ours.weight)
    torch.testing.assert_close(torch.jit.script(ours)(x), ours(x))
    assert ours(x[0]).shape == (40,)
    batched = torch.func.vmap(lambda w: linear(x, w))(torch.randn(3, 40, 24))
    assert batched.shape == (3, 7, 40)


def test_gradients_of_a_forward_pass_that_nobody_saw():
    """In programs, and for many gradients at once, they are of common operators too."""
    x, weight = torch.randn(7, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    out, grads = linear(x, weight), torch.randn(3, 7, 40)

    def gradients(grad):
        return torch.autograd.grad(out, (x, weight), grad, retain_graph=True)

    assert "mkldnn" not in str(make_fx(gradients)(grads[0]).graph)
    for several, one in zip(torch.func.vmap(gradients)(grads), gradients(grads[2]), strict=True):
        torch.testing.assert_close(several[2], one)


@pytest.mark.parametrize("grad", [True, False])
def test_folded_gelu(grad):
    ours, x = layer(), torch.randn(7, 24)
    expected = F.gelu(F.linear(x, ours.weight, ours.bias))
    ours.activation = "gelu"
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.jit.script(ours)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.compile
@needs_onednn
@pytest.mark.parametrize("grad", [True, False])
def test_compiles_without_breaks_for_any_size(grad):
    ours = nn.Sequential(layer(), nn.GELU(), Linear(40, 8))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            x = torch.randn(rows, 24)
            torch.testing.assert_close(compiled(x), ours(x))
            if grad:
                compiled(x).sum().backward()


@pytest.mark.compile
@needs_onednn
def test_registered_operator():
    x, weight, bias = torch.randn(2, 5, 24), torch.randn(40, 24), torch.randn(40)
    torch.library.opcheck(torch.ops.vitlinear.linear, (x, weight, bias, "gelu", False))
    ours = layer().requires_grad_(False)
    compiled = torch.compile(ours, backend="aot_eager")
    assert "vitlinear::linear" in operators(lambda: compiled(x))


@needs_onednn
def test_counted_as_multiply_adds():
    ours, x = layer(), torch.randn(2, 5, 24)
    with FlopCounterMode(display=False) as counter:
        ours(x).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 10 * 24 * 40)  # no gradient of x
