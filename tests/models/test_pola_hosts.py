"""Pola-PVT and Pola-Swin against the released code and their definitions."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import timm
import torch
from timm.layers import RelPosBias
from torch import nn

from tests import golden
from tests.pairwise import some_by_night
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.layers.attention.pola_attention import PolaAttention, PolarityAttention
from vitlinear.report import backend_report


class Released(NamedTuple):
    """The authors' name, and parameters."""

    name: str
    params: int


RELEASED = {
    "pola_pvt_tiny": Released("pola_pvt_t", 12_924_648),
    "pola_pvt_small": Released("pola_pvt_s", 23_157_224),
    "pola_pvt_medium": Released("pola_pvt_m", 39_965_672),
    "pola_pvt_base": Released("pola_pvt_b", 54_366_568),
    "pola_swin_tiny": Released("pola_swin_t", 29_285_696),
    "pola_swin_small": Released("pola_swin_s", 50_603_600),
    "pola_swin_base": Released("pola_swin_b", 89_137_864),
    "pola_swin_base_384": Released("pola_swin_b_384", 91_599_304),
}
HOSTS = ("test_pola_pvt", "test_pola_swin")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def loaded():
    """Models with the golden weights, float64, made once."""
    models: dict[str, torch.nn.Module] = {}

    def load(name: str) -> torch.nn.Module:
        if name not in models:
            entries = golden.variants("polaformer")[RELEASED[name].name]["state_dict"]
            weights = golden.upstream_state_dict(entries, "polaformer")
            models[name] = golden.loaded(name, weights)
        return models[name]

    return load


SIZES = {"pola_pvt_tiny": [(224, 224), (192, 256)], "pola_swin_tiny": [(224, 224), (224, 448)]}


@pytest.mark.slow
@some_by_night(
    "name, size, backend",
    [
        (name, size, backend)
        for name, sizes in SIZES.items()
        for size in sizes
        for backend in golden.BACKENDS
    ],
    [
        (name, size, backend)
        for name, sizes in SIZES.items()
        for size, backend in zip(sizes, golden.BACKENDS, strict=True)
    ],
)
def test_golden_logits(loaded, name, size, backend):
    model = loaded(name)
    for module in model.modules():
        if isinstance(module, PolarityAttention):
            module.backend = backend
    with torch.no_grad():
        logits = model(golden.images(*size)[:1])[:, :64]
    expected = golden.logits(RELEASED[name].name, *size)[:1]
    assert golden.relative_error(logits, expected) < 1e-13


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_and_keys_of_every_variant(name):
    model = timm.create_model(name, device="meta")
    released = golden.variants("polaformer")[RELEASED[name].name]
    count = sum(p.numel() for p in model.parameters())
    assert count == RELEASED[name].params == released["num_params"]
    weights = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in released["state_dict"]
    }
    for key in ("layers.0.blocks.1.attn_mask", "layers.2.blocks.0.attn.relative_position_index"):
        if "swin" in name:  # derived buffers, which the files hold
            weights.setdefault(key, torch.empty(1, device="meta"))
    converted = checkpoint_filter_fn(weights, model)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("pola_pvt_base", ["P" * 3, "P" * 8, "P" * 27, "P" * 3]),
        ("pola_swin_tiny", ["PP", "PP", "SSSSSS", "SS"]),
        ("pola_swin_base_384", ["PP", "PP", "S" * 18, "SS"]),
    ],
)
def test_where_attention_is_linear(name, kinds):
    model = timm.create_model(name, device="meta")
    found = [
        "".join("P" if isinstance(block.attn, PolaAttention) else "S" for block in stage.blocks)
        for stage in model.stages
    ]
    assert found == kinds


def test_windows_of_every_size(loaded):
    """Of the tables, by the size that a model is made for; and which blocks are shifted."""
    model = timm.create_model("pola_swin_base_384", device="meta")
    attentions = [block.attn for stage in model.stages for block in stage.blocks]
    grids = [attn.grid_size for attn in attentions if isinstance(attn, PolaAttention)]
    assert grids == [(96, 96)] * 2 + [(48, 48)] * 2
    assert {attn.rel_pos.side for attn in attentions[4:]} == {12}
    assert [attn.shift for attn in attentions[:4]] == [False, True] * 2
    assert [attn.shift for attn in attentions[4:]] == [0, 6] * 10
    model = timm.create_model("pola_swin_tiny", img_size=(96, 160), device="meta")
    attentions = [block.attn for stage in model.stages for block in stage.blocks]
    assert [attn.grid_size[0] for attn in attentions[:4]] == [24, 24, 12, 12]
    assert [attn.rel_pos.side for attn in attentions[4:]] == [6] * 6 + [3] * 2


@pytest.mark.parametrize("name", HOSTS)
def test_backend_report_counts_windows(name):
    model = timm.create_model(name, attn_backend="library")
    report = backend_report(model, (2, 3, 128, 100))
    linear = {"test_pola_pvt": 5, "test_pola_swin": 3}[name]
    assert [row.attn_type for row in report[:linear]] == ["pola"] * linear
    assert all(row.attn_type == "softmax" and row.backend == "eager" for row in report[linear:])
    assert all(row.backend == "library" for row in report[:linear])
    if name == "test_pola_swin":  # 32 x 25 tokens in windows of 24 x 24, 16 x 13 in two of 13 x 13
        assert report[0].shape[:2] == (2 * 4, 24 * 24)
        assert report[2].shape[:2] == (2 * 2, 13 * 13)


@pytest.mark.parametrize("name", HOSTS)
def test_parameters_without_decay(name):
    """As released: tables of relative positions alone, beside what has one axis."""
    model = timm.create_model(name)
    names = model.no_weight_decay()
    assert names <= {key for key, _ in model.named_parameters()}
    assert len(names) == {"test_pola_pvt": 0, "test_pola_swin": 3}[name]
    decayed = ("pos_embed", "positional_encoding", "scale", "power")
    assert all(p.dim() > 1 for key, p in model.named_parameters() if key.endswith(decayed))


def test_initial_values():
    """Convolutions as PyTorch makes them, the classifier as linear layers."""
    model = timm.create_model("test_pola_pvt", embed_dims=(64,) * 4, num_heads=(1,) * 4)
    assert model.stem.conv.bias.any() and model.stem.conv.weight.std() > 0.05
    assert model.head.fc.weight.std() < 0.03 and not model.head.fc.bias.any()
    attention = model.stages[0].blocks[0].attn
    assert not attention.scale.any() and not attention.positional_encoding.any()
    torch.testing.assert_close(attention.attend.powers(), torch.full((1, 64), 3.0))


def test_norm_that_is_never_applied():
    model = timm.create_model("test_pola_pvt").eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    nn.init.constant_(model.final.weight, 7.0)
    nn.init.constant_(model.final.bias, 3.0)
    out = model(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert not model.final.weight.grad.any() and not model.final.bias.grad.any()
    assert isinstance(model.fuse().final, nn.Identity)


def test_incomplete_patches_are_left_out_of_pvt():
    model = timm.create_model("test_pola_pvt", features_only=True).eval()
    maps = model(torch.randn(1, 3, 200, 232))
    assert [m.shape[2:] for m in maps] == [(50, 58), (25, 29), (12, 14), (6, 7)]


@pytest.mark.parametrize("name", HOSTS)
def test_a_checkpoint_of_another_size_gives_the_same(name):
    """Resizing as it is loaded is what each forward pass does otherwise."""
    small, large = (timm.create_model(name, img_size=side).double().eval() for side in (64, 160))
    for key, parameter in small.named_parameters():
        if key.endswith(("pos_embed", "positional_encoding", "bias_table", "scale", "power")):
            nn.init.normal_(parameter)
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    x = torch.randn(1, 3, 160, 160).double()
    with torch.no_grad():
        torch.testing.assert_close(large(x), small(x), rtol=1e-9, atol=1e-11)


def test_tables_of_other_windows_are_resized():
    small = timm.create_model("test_pola_swin")
    large = timm.create_model("test_pola_swin", window_size=5)
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    tables = [
        [m.relative_position_bias_table for m in model.modules() if isinstance(m, RelPosBias)]
        for model in (small, large)
    ]
    assert len(tables[0]) == len(tables[1]) == 3
    for old, new in zip(*tables, strict=True):
        assert new.shape == (9 * 9, 4)
        torch.testing.assert_close(new[40], old[24], rtol=1e-3, atol=1e-4)  # no offset


BAD_OPTIONS = {
    "must have four entries": ("test_pola_pvt", {"depths": (1, 1)}),
    "dim 16 does not divide into 3 heads": ("test_pola_pvt", {"num_heads": (3, 2, 3, 4)}),
    "one for each stage; got": ("test_pola_swin", {"attn_types": "pola"}),
    "unknown attention 'rala'": ("test_pola_swin", {"attn_types": ("rala",) * 4}),
    "a side of at least 1, got 0": ("test_pola_swin", {"window_size": 0}),
    "a side of at least 1, got -1": ("test_pola_swin", {"pola_window_size": -1}),
    "unknown backend 'cuda'": ("test_pola_swin", {"attn_backend": "cuda"}),
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_option_is_named(message):
    name, options = BAD_OPTIONS[message]
    with pytest.raises(ValueError) as caught:
        timm.create_model(name, **options)
    assert message in str(caught.value)
