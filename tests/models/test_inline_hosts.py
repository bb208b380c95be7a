"""InLine-PVT, InLine-Swin and InLine-CSwin against the released code and their definitions."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import RelPosBias
from torch import Tensor, nn

from tests import golden
from tests.pairwise import some_by_night
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.layers.attention.cross_shaped_attention import CrossShapedAttention
from vitlinear.layers.attention.inline_attention import InjectiveAttention, InLineAttention
from vitlinear.layers.attention.shifted_window_attention import ShiftedWindowAttention
from vitlinear.layers.windows import equal_windows
from vitlinear.report import backend_report


class Released(NamedTuple):
    """Parameters, and giga multiply-adds of convolutions and linear layers and of attention."""

    params: int
    projections: float
    attention: float
    side: int = 224


RELEASED = {
    "inline_pvt_tiny": Released(12_032_232, 1.925, 0.051),
    "inline_pvt_small": Released(21_556_136, 3.820, 0.095),
    "inline_pvt_medium": Released(37_618_856, 6.718, 0.144),
    "inline_pvt_large": Released(51_154_280, 9.923, 0.206),
    "inline_swin_tiny": Released(29_223_544, 4.364, 0.095),
    "inline_swin_small": Released(49_793_296, 8.521, 0.199),
    "inline_swin_base": Released(88_350_120, 15.139, 0.259),
    "inline_swin_base_384": Released(88_465_320, 44.488, 1.712, 384),
    "inline_cswin_tiny": Released(20_604_520, 4.080, 0.232),
    "inline_cswin_small": Released(33_032_872, 6.405, 0.368),
    "inline_cswin_base": Released(73_413_640, 14.361, 0.524),
    "inline_cswin_base_384": Released(73_413_640, 42.202, 4.018, 384),
}
HOSTS = ("test_inline_pvt", "test_inline_swin", "test_inline_cswin")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def loaded():
    """Models with the golden weights, float64, made once."""
    models: dict[str, torch.nn.Module] = {}

    def load(name: str) -> torch.nn.Module:
        if name not in models:
            entries = golden.variants("inline")[name]["state_dict"]
            models[name] = golden.loaded(name, golden.upstream_state_dict(entries))
        return models[name]

    return load


OUTPUTS = [
    ("inline_pvt_tiny", (224, 224)),
    ("inline_pvt_tiny", (192, 256)),
    ("inline_swin_tiny", (224, 224)),
    ("inline_cswin_tiny", (224, 224)),
    ("inline_swin_base_384", (384, 384)),
]


@pytest.mark.slow
@some_by_night(
    "name, size, backend",
    [(*output, backend) for output in OUTPUTS for backend in golden.BACKENDS],
    # With the backends in turn, and the largest one not at all.
    [(*output, golden.BACKENDS[place % 2]) for place, output in enumerate(OUTPUTS[:-1])],
)
def test_golden_logits(loaded, name, size, backend):
    model = loaded(name)
    for module in model.modules():
        if isinstance(module, InjectiveAttention):
            module.backend = backend
    with torch.no_grad():
        logits = model(golden.images(*size)[:1])[:, :64]
    assert golden.relative_error(logits, golden.logits(name, *size)[:1]) < 1e-12


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_and_keys_of_every_variant(name):
    model = timm.create_model(name, device="meta")
    released = golden.variants("inline")[name]
    count = sum(p.numel() for p in model.parameters())
    assert count == RELEASED[name].params == released["num_params"]
    weights = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in released["state_dict"]
    }
    converted = checkpoint_filter_fn(weights, model)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


# Of each host the smallest and the largest: those for images of 384 pixels, where there are any.
COUNTED = ("inline_pvt_tiny", "inline_pvt_large", "inline_swin_tiny", "inline_swin_base_384")
COUNTED += ("inline_cswin_tiny", "inline_cswin_base_384")


@some_by_night("name", RELEASED, COUNTED)
def test_multiply_adds(name):
    row = RELEASED[name]
    counted = golden.giga_multiply_adds(name, row.side)
    assert counted == pytest.approx(row.projections + row.attention, rel=0.01)


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("inline_pvt_large", ["I" * 3, "I" * 8, "I" * 27, "I" * 3]),
        ("inline_swin_tiny", ["II", "II", "IIIIII", "SS"]),
        ("inline_swin_small", ["II", "II", "S" * 18, "SS"]),
        ("inline_swin_base_384", ["II", "II", "II" + "S" * 16, "SS"]),
        ("inline_cswin_tiny", ["II", "IIII", "S" * 18, "S"]),
        ("inline_cswin_base", ["III", "I" * 6, "S" * 29, "SS"]),
    ],
)
def test_where_attention_is_linear(name, kinds):
    model = timm.create_model(name, device="meta")
    found = [
        "".join(
            "I" if any(isinstance(m, InjectiveAttention) for m in block.modules()) else "S"
            for block in stage.blocks
        )
        for stage in model.stages
    ]
    assert found == kinds


@pytest.mark.parametrize("name", HOSTS)
def test_backend_report_counts_windows(name):
    model = timm.create_model(name, attn_backend="library")
    report = backend_report(model, (2, 3, 128, 100))
    linear = {"test_inline_pvt": 5, "test_inline_swin": 3, "test_inline_cswin": 2}[name]
    assert [row.attn_type for row in report[:linear]] == ["inline"] * linear
    assert all(row.attn_type == "softmax" and row.backend == "eager" for row in report[linear:])
    assert all(row.backend == "library" for row in report[:linear])
    if name != "test_inline_pvt":  # 32 x 25 tokens in four windows of at most 24 x 24
        assert report[0].shape[:2] == (2 * 4, 16 * 13)


@pytest.mark.parametrize("name", HOSTS)
def test_parameters_without_decay(name):
    model = timm.create_model(name)
    names = model.no_weight_decay()
    assert names <= {key for key, _ in model.named_parameters()}
    assert len(names) == {"test_inline_pvt": 4, "test_inline_swin": 3, "test_inline_cswin": 0}[name]


def same(count: int, length: int, shift: int, size: int) -> torch.Tensor:
    """Which places of a side share a window of this length, shifted without wrapping: [N, N]."""
    window = (torch.arange(size) - shift) // length if count > 1 else torch.zeros(size)
    return window[:, None] == window


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (5, 9), (4, 9), (1, 1), (3, 2), (17, 6)])
@pytest.mark.parametrize("shift", [False, True])
def test_shifted_windows(size, shift):
    """Over all pairs of tokens: cyclic shifts and padding are only a way to compute it."""
    (H, W), side, heads, dim = size, 4, 2, 8
    layer = ShiftedWindowAttention(dim, heads, side, shift=shift).double()
    torch.nn.init.normal_(layer.rel_pos.relative_position_bias_table)
    x = torch.randn(2, H, W, dim).double()
    q, k, v = layer.qkv(x.flatten(1, 2)).reshape(2, H * W, 3, heads, -1).permute(2, 0, 3, 1, 4)
    offset = side // 2 if shift else 0
    row, col = torch.arange(H).repeat_interleave(W), torch.arange(W).repeat(H)
    down, right = row[:, None] - row + side - 1, col[:, None] - col + side - 1
    rows, cols = same(-(-H // side), side, offset, H), same(-(-W // side), side, offset, W)
    seen = rows[row][:, row] & cols[col][:, col]
    index = (down * (2 * side - 1) + right).masked_fill(~seen, 0)
    bias = layer.rel_pos.relative_position_bias_table[index].permute(2, 0, 1)
    logits = (q @ k.transpose(-1, -2)) * (dim // heads) ** -0.5 + bias
    out = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    expected = layer.proj(out.transpose(1, 2).flatten(2)).unflatten(1, size)
    torch.testing.assert_close(layer(x), expected)
    out = layer(x)
    grads = [torch.autograd.grad(y.square().sum(), layer.parameters()) for y in (out, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (5, 9), (1, 1), (3, 14)])
def test_cross_shaped_windows(size):
    """Half of the heads in vertical stripes, half in horizontal ones, LePE inside each stripe."""
    (H, W), split, dim = size, 4, 8
    layer = CrossShapedAttention(dim, 2, "softmax", split).double()
    x = torch.randn(2, H, W, dim).double()
    q, k, v = layer.qkv(x).chunk(3, -1)
    outs = []
    for i, axis in enumerate((2, 1)):
        heads = slice(4 * i, 4 * i + 4)
        length = equal_windows(size[axis - 1], split)[1]
        stripes = []
        for begin in range(0, size[axis - 1], length):
            part = [
                y[..., heads].narrow(axis, begin, min(length, size[axis - 1] - begin))
                for y in (q, k, v)
            ]
            flat = [y.flatten(1, 2) for y in part]
            weights = (flat[0] @ flat[1].transpose(1, 2) / 2).softmax(-1)
            out = (weights @ flat[2]).reshape(part[2].shape)
            stripes.append(out + layer.branches[i].lepe(part[2]))
        outs.append(torch.cat(stripes, axis))
    expected = layer.proj(torch.cat(outs, -1))
    torch.testing.assert_close(layer(x, torch.full_like(x, torch.nan)), expected)


@pytest.mark.parametrize("size", [(4, 3), (5, 9)])
def test_inline_branch_takes_its_kernels_from_the_other_map(size):
    layer = CrossShapedAttention(8, 2, "inline", 4).double()
    attention = InLineAttention(8, 2, 4).double()
    x, source = torch.randn(2, 2, *size, 8).double()
    state = {k.replace("branches.0.", ""): v for k, v in layer.state_dict().items()}
    torch.nn.init.zeros_(layer.branches[0].lepe.weight)
    torch.nn.init.zeros_(layer.branches[0].lepe.bias)
    attention.load_state_dict({k: v for k, v in state.items() if "lepe" not in k})
    torch.testing.assert_close(layer(x, x), attention(x))
    assert not torch.allclose(layer(x, source), attention(x))


def positions(stem: nn.Module, height: int, width: int) -> Tensor:
    return stem.add_positions.resized(stem.pos_embed, stem.grid_size, height, width)


def test_positions_fit_the_trained_size_and_stretch_to_others():
    stem = timm.create_model("test_inline_pvt").double().stem
    table = stem.pos_embed.reshape(1, 40, 40, -1)
    assert torch.equal(positions(stem, 40, 40), table)
    expected = F.interpolate(table.permute(0, 3, 1, 2), size=(31, 50), mode="bilinear")
    assert torch.equal(positions(stem, 31, 50), expected.permute(0, 2, 3, 1))


def test_incomplete_patches_are_left_out_of_pvt():
    """As released: 200 x 232 pixels are 12 x 14 tokens in the third stage, not 13 x 15."""
    model = timm.create_model("test_inline_pvt", features_only=True).eval()
    x = torch.randn(1, 3, 200, 232)
    maps = model(x)
    assert [m.shape[2:] for m in maps] == [(50, 58), (25, 29), (12, 14), (6, 7)]


def test_tables_of_other_windows_are_resized():
    small = timm.create_model("test_inline_swin")
    large = timm.create_model("test_inline_swin", window_size=6)
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    tables = [
        [m.relative_position_bias_table for m in model.modules() if isinstance(m, RelPosBias)]
        for model in (small, large)
    ]
    assert len(tables[0]) == len(tables[1]) == 3
    for old, new in zip(*tables, strict=True):
        assert new.shape == (11 * 11, 4)
        # No offset is the centre of both.
        torch.testing.assert_close(new[60], old[24], rtol=1e-3, atol=1e-4)


def test_positions_of_another_size_are_resized():
    small, large = (timm.create_model("test_inline_pvt", img_size=side) for side in (160, 224))
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    expected = positions(small.stem, 56, 56)
    torch.testing.assert_close(positions(large.stem, 56, 56), expected)


BAD_OPTIONS = {
    "must have four entries": ("test_inline_pvt", {"depths": (1, 1)}),
    "dim 16 does not divide into 3 heads": ("test_inline_pvt", {"num_heads": (3, 2, 3, 4)}),
    "one for each stage; got": ("test_inline_swin", {"num_inline": (1, 1)}),
    "a side of at least 1, got 0": ("test_inline_swin", {"window_size": 0}),
    "unknown attention 'rala'": ("test_inline_cswin", {"attn_types": ("rala",) * 4}),
    "3 heads in two branches": ("test_inline_cswin", {"num_heads": (1, 2, 3, 4)}),
    "unknown backend 'cuda'": ("test_inline_cswin", {"attn_backend": "cuda"}),
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_option_is_named(message):
    name, options = BAD_OPTIONS[message]
    with pytest.raises(ValueError) as caught:
        timm.create_model(name, **options)
    assert message in str(caught.value)
