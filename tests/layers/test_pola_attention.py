"""PolaFormer's attention against the released code and its definition."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import golden
from vitlinear.layers.attention.pola_attention import PolaAttention

BACKENDS = pytest.mark.parametrize("backend", ["eager", "library"])
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


def random_(module: nn.Module) -> nn.Module:
    """Parameters that begin at zero, away from it."""
    for name, parameter in module.named_parameters():
        if name.endswith(("power", "scale", "positional_encoding")):
            nn.init.normal_(parameter)
    return module


def released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a golden case under our names."""
    ours = dict(weights)
    for part in ("weight", "bias"):
        ours[f"attend.lepe.{part}"] = ours.pop(f"dwc.{part}")
        if f"qg.{part}" in ours:
            q, g = ours.pop(f"qg.{part}").chunk(2)
            ours[f"qkvg.{part}"] = torch.cat([q, ours.pop(f"kv.{part}"), g])
    ours["attend.power"] = ours.pop("power")
    return ours


@BACKENDS
@pytest.mark.parametrize(
    "name", ["pvt_attn_a", "pvt_attn_b", "pvt_small_a", "swin_attn_a", "swin_attn_b"]
)
def test_golden_attention(name, backend):
    case = golden.attention_case(f"pola_{name}", "polaformer")
    size = case["H"], case["W"]
    # Windows as large as the map, where the host has them.
    window = size[0] if "swin" in name else 0
    module = PolaAttention(
        case["C"], case["heads"], size, window, shift=window > 0, backend=backend
    ).double()
    module.load_state_dict(released(case["weights"]))
    x = case["x"].requires_grad_()
    out = module(x.unflatten(1, size)).flatten(1, 2)
    wanted = {
        "input": x,
        "power": module.attend.power,
        "scale": module.scale,
        "positional_encoding": module.positional_encoding,
    }
    wanted = {key: value for key, value in wanted.items() if f"grad_{key}" in case}
    assert len(wanted) >= 3
    assert golden.relative_error(out, case["out"]) < 1e-13
    for key, grad in zip(
        wanted, torch.autograd.grad(out, list(wanted.values()), case["grad"]), strict=True
    ):
        assert golden.relative_error(grad, case[f"grad_{key}"]) < 1e-13, key


def defined(module: PolaAttention, x: Tensor) -> Tensor:
    """The attention to all tokens of x, [B, H, W, C], written out token by token."""
    B, H, W, C = x.shape
    h, D = module.attend.num_heads, module.attend.head_dim
    q, k, v, g = module.qkvg(x.flatten(1, 2)).chunk(4, -1)
    grid = module.positional_encoding.reshape(1, *module.grid_size, C).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (H, W), mode="bicubic", align_corners=False)
    scale = F.softplus(module.scale)
    q, k = q / scale, (k + grid.flatten(2).transpose(1, 2)) / scale
    p = (1 + 4 * module.attend.power.sigmoid())[0]  # [h, 1, D]

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (h, D)).transpose(1, 2)

    def features(y: Tensor) -> Tensor:
        return torch.cat([y.clamp(min=0) ** p, (-y).clamp(min=0) ** p], -1)

    halves = []
    for sign, values in zip((1, -1), heads(v).chunk(2, -1), strict=True):
        weights = features(sign * heads(q)) @ features(heads(k)).transpose(-1, -2) / (H * W)
        halves.append(weights @ values / (weights.sum(-1, keepdim=True) + 1e-6))
    out = torch.cat(halves, -1).transpose(1, 2).reshape(B, H, W, C)
    maps = v.reshape(B, H, W, h, D).permute(0, 3, 4, 1, 2).flatten(0, 1)
    conv = F.conv2d(maps, module.attend.lepe.weight, module.attend.lepe.bias, padding=2, groups=D)
    conv = conv.unflatten(0, (B, h)).permute(0, 3, 4, 1, 2).flatten(3)
    return module.proj((out + conv) * g.reshape(B, H, W, C))


@pytest.mark.quick
@BACKENDS
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (9, 6), (1, 1)])
def test_whole_map(size, backend):
    module = random_(PolaAttention(12, 3, (4, 4), backend=backend)).double()
    x = torch.randn(2, *size, 12).double()
    expected = defined(module, x)
    for form in (module, scripted(module), copy.deepcopy(module).fuse()):
        torch.testing.assert_close(form(x), expected, rtol=1e-9, atol=1e-11)
    grads = [
        torch.autograd.grad(y.square().sum(), module.parameters()) for y in (module(x), expected)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@BACKENDS
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (4, 8), (8, 12), (3, 6), (12, 8)])
def test_windows_as_released(size, shift, backend):
    """Square ones; where they are smaller than both sides, shifted round the ends of the map."""
    module = random_(PolaAttention(8, 2, (4, 4), 4, shift, backend=backend)).double()
    x = torch.randn(2, *size, 8).double()
    side = min(4, *size)
    down = 2 if shift and min(size) > 4 else 0
    rolled = x.roll((-down, -down), (1, 2))
    expected = torch.empty_like(x)
    for top in range(0, size[0], side):
        for left in range(0, size[1], side):
            window = rolled[:, top : top + side, left : left + side]
            expected[:, top : top + side, left : left + side] = defined(module, window)
    expected = expected.roll((down, down), (1, 2))
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(scripted(module)(x), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [(5, 9), (9, 6), (11, 13)])
@pytest.mark.parametrize("shift", [False, True])
def test_incomplete_windows_see_nothing_beyond_the_map(size, shift):
    """As the same windows of a larger map whose rest is padding."""
    module = random_(PolaAttention(8, 2, (4, 4), 4, shift)).double()
    x = torch.randn(2, *size, 8).double()
    whole = [-(-length // 4) * 4 for length in size]
    padded = torch.full((2, *whole, 8), torch.nan).double()
    padded[:, : size[0], : size[1]] = x
    mask = torch.ones(2, *whole, dtype=torch.bool)
    mask[:, : size[0], : size[1]] = False
    out = module(padded, mask)[:, : size[0], : size[1]]
    torch.testing.assert_close(module(x), out, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [0, 4])
def test_padding_equals_cropping(window):
    """In Python and in TorchScript, with NaN in the padding: positions are those of each part."""
    module = random_(PolaAttention(8, 2, (4, 4), window, shift=True)).double().eval()
    sizes = [(9, 7), (5, 6), (9, 1), (1, 7)]
    x = torch.full((4, 9, 7, 8), torch.nan).double()
    for row, (height, width) in zip(x, sizes, strict=True):
        row[:height, :width] = torch.randn(height, width, 8)
    for form in (module, scripted(module)):
        out = form(x, None, sizes)
        for y, row, (height, width) in zip(x, out, sizes, strict=True):
            alone = module(y[None, :height, :width])[0]
            torch.testing.assert_close(row[:height, :width], alone, rtol=1e-9, atol=1e-11)
            assert not row[height:].any() and not row[:, width:].any()


@BACKENDS
def test_nothing_but_padding(backend):
    module = random_(PolaAttention(8, 2, (3, 3), backend=backend))
    x, mask = torch.randn(2, 3, 3, 8), torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[0] = True
    out = module(x, mask)
    torch.testing.assert_close(out[1:], module(x[1:]))
    grads = torch.autograd.grad(out.square().sum(), module.parameters())
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("scale, power", [(-1e4, 0.0), (-100.0, 30.0), (-8.0, -30.0), (50.0, 30.0)])
def test_extreme_scales_and_powers(scale, power, dtype, backend):
    """A scale of zero, powers of 1 and of 5, inputs of zero: finite, and so are the gradients."""
    module = PolaAttention(8, 2, (3, 3), backend=backend)
    nn.init.constant_(module.scale, scale)
    nn.init.constant_(module.attend.power, power)
    module = module.to(dtype)
    x = torch.randn(2, 3, 3, 8).to(dtype)
    x[0] = 0
    out = module(x.requires_grad_())
    grads = torch.autograd.grad(out.float().square().sum(), (x, *module.parameters()))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype):
    module, x = random_(PolaAttention(16, 2, (6, 6))), torch.randn(2, 5, 7, 16)
    out = module.to(dtype)(x.to(dtype))
    expected = module.double()(x.to(dtype).double())
    assert out.dtype == dtype
    assert (out.double() - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()


def test_fuse_keeps_what_others_hold():
    module, x = random_(PolaAttention(8, 2, (3, 3))), torch.randn(2, 3, 3, 8)
    expected = module(x)
    fused = module.fuse()
    assert fused is not module and fused.scale is None
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    assert fused.fuse() is fused
    module.qkvg.register_forward_hook(lambda *_: None)
    assert module.fuse() is module


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="dim 30 does not divide into 4 heads"):
        PolaAttention(30, 4, (3, 3))
    with pytest.raises(ValueError, match="2 heads of a multiple of 2 channels"):
        PolaAttention(6, 2, (3, 3))
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        PolaAttention(24, 3, (3, 3), backend="fast")
