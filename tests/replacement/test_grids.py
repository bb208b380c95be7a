"""Where tokens stand, and which of them there are: maps of any size, padding, shifted windows."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from tests.replacement.zoo import FAMILIES, features, randomised
from vitlinear import replace_attention
from vitlinear.replacement.attentions import regions_of


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("vit, registers", {"name": "mila"}),  # which convolves maps
        ("dinov3", {"name": "mala", "rope": True}),
        pytest.param("deit, distilled", {"name": "mila"}, marks=pytest.mark.nightly),
    ],
)
def test_maps_of_any_size(family, arguments):
    """A model of dynamic size is, on each map, the one that was resized to it."""
    small = FAMILIES[family]
    dynamic, fixed = small.create(dynamic_img_size=True), small.create(dynamic_img_size=False)
    for model in (dynamic, fixed):
        replace_attention(model, blocks="1:", keep=small.keep, **arguments)
    randomised(dynamic)
    fixed.load_state_dict(dynamic.state_dict())
    side = small.size
    copied = copy.deepcopy(dynamic)
    for size in ((side, 2 * side), (2 * side, side)):
        x = torch.randn(2, 3, *size)
        resized = copy.deepcopy(fixed)
        resized.set_input_size(size)
        expected = features(resized, x)
        torch.testing.assert_close(features(dynamic, x), expected)
        torch.testing.assert_close(features(copied, x), expected)
    with pytest.raises(AssertionError, match="match model"):
        features(fixed, x)


def test_positions_of_the_mixer_turn_the_map_and_not_the_tokens_before_it():
    small = FAMILIES["vit, registers"]
    model = small.create()
    model.pos_embed.data.zero_()
    replace_attention(model, "mala")
    replace_attention(turned := copy.deepcopy(model), "mala", rope=True)
    x = small.images()
    flipped = x.flip(-1).reshape(2, 3, 4, 16, 4, 16).flip(-1).reshape(2, 3, 64, 64)
    # Without positions patches have no order; a mirrored row of patches is the same set of tokens.
    first = slice(0, model.num_prefix_tokens)
    torch.testing.assert_close(features(model, x)[:, first], features(model, flipped)[:, first])
    there, mirrored = features(turned, x)[:, first], features(turned, flipped)[:, first]
    assert (there - mirrored).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["mala", "rala", "softmax"])
def test_padding_of_naflex_equals_cropping(attention):
    """Images of several sizes in one batch, padded to one length."""
    model = FAMILIES["naflexvit"].create()
    replace_attention(model, attention)
    assert model.use_key_only_attn_mask
    lengths, longest = ((2, 3), (4, 2)), 10
    patches = torch.randn(2, longest, 16 * 16 * 3)
    coord = torch.zeros(2, longest, 2, dtype=torch.long)
    valid = torch.zeros(2, longest, dtype=torch.bool)
    for i, (height, width) in enumerate(lengths):
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        coord[i, : height * width] = places
        valid[i, : height * width] = True
    batch = {"patches": patches, "patch_coord": coord, "patch_valid": valid}
    with torch.no_grad():
        together = model(batch)
        for i, (height, width) in enumerate(lengths):
            alone = {key: value[i : i + 1, : height * width] for key, value in batch.items()}
            torch.testing.assert_close(model(alone), together[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["mala", "rala", "mila"])
def test_regions_of_a_shifted_window_do_not_see_each_other(attention):
    model = FAMILIES["swin"].create()
    whole = copy.deepcopy(model)
    replace_attention(model, attention, 1, keep=["mask"])
    replace_attention(whole, attention, 1, keep=[])
    randomised(model)
    whole.load_state_dict(model.state_dict())
    block = model.layers[0].blocks[1]
    assert block.shift_size == (2, 2)
    regions = regions_of(block.attn_mask)
    assert regions.max() == 3 and (regions[0] == 0).all()
    x = torch.randn(2 * len(regions), 16, 24, requires_grad=True)
    out = block.attn(x, mask=block.attn_mask)
    for window in (0, 3, 12, 15, 31):
        of_window = regions[window % 16]
        for region in of_window.unique():
            there = of_window == region
            height = 4 if len(of_window.unique()) == 1 or (window % 16) == 3 else 2
            alone = block.attn.attend(x[window : window + 1, there], height=height,
                                      width=int(there.sum()) // height)  # fmt: skip
            torch.testing.assert_close(out[window, there], alone[0])
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.isfinite().all()
    images = torch.randn(2, 3, 64, 64)
    assert (features(model, images) - features(whole, images)).abs().max() > 1e-3


def test_windows_of_another_size_and_maps_that_windows_do_not_fit():
    model = FAMILIES["swin"].create()
    replace_attention(model, "mila", keep=["mask"])
    model.set_input_size((72, 56), window_size=3)
    assert {block.attn.window_size for block in model.layers[0].blocks} == {(3, 3)}
    assert features(model, torch.randn(1, 3, 72, 56)).isfinite().all()
    strict = timm.create_model(
        "swin_tiny_patch4_window7_224", **FAMILIES["swin"].kwargs, strict_img_size=False
    ).eval()
    replace_attention(strict, "mila", keep=["mask"])
    assert features(strict, torch.randn(1, 3, 72, 56)).shape[1:3] == (3, 2)


def test_another_patch_embedding_has_another_map():
    """Also in copies; a copy of an attention alone does not bring the model along."""
    model = FAMILIES["vit, registers"].create(dynamic_img_size=False)
    replace_attention(model, "mila", 0)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        one.patch_embed = timm.layers.PatchEmbed(64, 8, 3, one.embed_dim)
        assert one.blocks[0].attn.token_map.size() == (8, 8)
        one.patch_embed = timm.layers.PatchEmbed(64, 32, 3, one.embed_dim)
    assert copied.blocks[0].attn.token_map.owner is copied
    alone = copy.deepcopy(model.blocks[0].attn)
    assert alone.token_map.size() == (2, 2)
    assert not hasattr(alone.token_map.owner, "blocks")
    dynamic = FAMILIES["vit, registers"].create(dynamic_img_size=True)
    replace_attention(dynamic, "mila", 0)
    dynamic.patch_embed = copied.patch_embed
    with pytest.raises(ValueError, match="was exchanged after replace_attention"):
        dynamic.blocks[0].attn.token_map.size()


def test_what_moves_in_training_is_not_recomputed_silently():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    replace_attention(model, "routing", clusters=2)
    x = torch.randn(1, 3, 32, 32)
    model.train()(x).sum().backward()
    model.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="routing moves its centroids in training"):
        model(x).sum().backward()
    model.eval()(x).sum().backward()


def test_gradient_checkpointing_changes_nothing():
    small = FAMILIES["dinov3"]
    model, x = small.create(), small.images()
    replace_attention(model, "mila")
    randomised(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
