"""LinearDeiT, and with it what the models of one resolution share."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import get_model_args, resolve_model_input_args, save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.ops import naive

NAMES = ["linear_deit_tiny", "linear_deit_small", "linear_deit_tiny_relu", "linear_deit_small_relu"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(**kwargs) -> nn.Module:
    model = timm.create_model("test_linear_deit", num_classes=7, **kwargs).eval()
    nn.init.normal_(model.pos_embed)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_that_of_deit(name):
    """The same parameters as timm's DeiT of that size, under the same names."""
    size = name.split("_")[2]
    model = timm.create_model(name, device="meta")
    deit = timm.create_model(f"deit_{size}_patch16_224", device="meta")
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in deit.state_dict().items()
    }
    types = {block.attn.attn_type for block in model.blocks}
    assert types == {"relu" if name.endswith("relu") else "elu"}


@pytest.mark.parametrize("attn_type", ["elu", "relu"])
def test_forward_by_hand(attn_type):
    model = make(attn_type=attn_type).double()
    x = torch.randn(2, 3, 96, 96).double()
    tokens = model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat((model.cls_token.expand(2, -1, -1), tokens), 1) + model.pos_embed
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(tokens)).reshape(2, 37, 3, 2, 32)
        out = naive.linear_attention(*qkv.unbind(2), attn_type)
        tokens = tokens + block.attn.proj(out.flatten(2))
        hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(tokens)))
        tokens = tokens + block.mlp.fc2(hidden)
    expected = model.head(
        nn.functional.layer_norm(tokens, (64,), model.norm.weight, model.norm.bias, 1e-6)[:, 0]
    )
    torch.testing.assert_close(model(x), expected)


def test_softmax_makes_it_deit():
    model = make(attn_type="softmax", img_size=224)
    deit = timm.create_model(
        "deit_tiny_patch16_224", embed_dim=64, num_heads=2, depth=4, num_classes=7
    ).eval()
    deit.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model(x), deit(x))


def test_l2_learns_its_temperature():
    blocks = make(attn_type="l2").blocks
    assert all(block.attn.temperature.requires_grad for block in blocks)
    assert make().blocks[0].attn.temperature is None


@pytest.mark.parametrize("name", ["test_linear_deit", "test_inline_deit"])
def test_positions_have_the_grid_that_a_script_asks_for(name):
    """timm's scripts hand --img-size to models whose description says that they take it."""
    kwargs = resolve_model_input_args(name, {"img_size": 48}, num_classes=3)
    model = timm.create_model(**kwargs)
    assert model.pos_embed.shape == (1, 1 + 3 * 3, 64)
    assert model(torch.randn(1, 3, 80, 33)).shape == (1, 3)  # and any other size still works


@pytest.mark.parametrize("size", [(96, 96), (96, 160), (33, 97), (1, 1), (16, 16)])
def test_positions_follow_the_grid(size):
    model, x = make(), torch.randn(2, 3, *size)
    grid = [-(-side // 16) for side in size]
    tokens, height, width = model.embed(x)
    assert [height, width] == grid
    padded = nn.functional.pad(x, (0, grid[1] * 16 - size[1], 0, grid[0] * 16 - size[0]))
    expected = model.patch_embed.proj(padded).flatten(2).transpose(1, 2)
    expected = torch.cat((model.cls_token.expand(2, -1, -1), expected), 1)
    pos = resample_abs_pos_embed(model.pos_embed, grid, [6, 6], num_prefix_tokens=1)
    assert (pos is model.pos_embed) == (grid == [6, 6])
    torch.testing.assert_close(tokens, expected + pos)


def test_transposed_grid_with_as_many_tokens():
    """48 x 192 pixels are 36 patches as well, but not those that the positions were learned for."""
    model = make()
    model.patch_embed.proj.weight.data.zero_()
    square, _, _ = model.embed(torch.zeros(1, 3, 96, 96))
    wide, height, width = model.embed(torch.zeros(1, 3, 48, 192))
    assert (height, width) == (3, 12) and square.shape == wide.shape
    assert not torch.allclose(square, wide)


def test_set_input_size():
    model, x = make(), torch.randn(2, 3, 80, 128)
    expected = model(x)
    model.pos_embed.requires_grad_(False)
    model.set_input_size((80, 128))
    assert model.pos_embed.shape == (1, 1 + 5 * 8, 64) and not model.pos_embed.requires_grad
    torch.testing.assert_close(model(x), expected)
    before = model.pos_embed
    model.set_input_size((80, 128))
    assert model.pos_embed is before


def test_resized_model_to_folder_and_back(tmp_path):
    model, x = make(), torch.randn(2, 3, 80, 128)
    model.set_input_size((80, 128))
    model.reset_classifier(5, "avg")
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.global_pool == "avg" and again.pos_embed.shape == model.pos_embed.shape
    assert get_model_args(again)["img_size"] is not None
    torch.testing.assert_close(again(x), model.eval()(x))


def test_positions_of_another_size_in_a_checkpoint():
    small, large = make(), make(img_size=(128, 160))
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    x = torch.randn(2, 3, 128, 160)
    torch.testing.assert_close(large(x), small(x))
    with pytest.raises(RuntimeError, match="pos_embed"):
        small.load_state_dict(checkpoint_filter_fn(large.state_dict(), small))


def test_intermediates():
    model, x = make(), torch.randn(2, 3, 80, 97)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(y.shape) for y in maps] == [(2, 64, 5, 7)] * 4
    pairs = model.forward_intermediates(
        x, [1, 3], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert len(pairs) == 2
    torch.testing.assert_close(torch.cat(pairs[1][::-1], 1), final)
    tokens = maps[1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(pairs[0][0], model.norm(tokens))
    with pytest.raises(AssertionError, match="NCHW or NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_prune():
    model, x = make(), torch.randn(2, 3, 96, 96)
    expected = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2 and model.num_classes == 0
    assert isinstance(model.norm, nn.Identity) and isinstance(model.head, nn.Identity)
    tokens = model.forward_features(x)
    features = tokens[:, 1:].transpose(1, 2).reshape(expected.shape)
    torch.testing.assert_close(features, expected)
    assert torch.equal(model(x), tokens)  # not pooled, as of timm's hosts
    model.reset_classifier(10, global_pool="avg")
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", ""])
def test_pooling(pool):
    model, x = make(), torch.randn(2, 3, 96, 64)
    tokens = model.forward_features(x)
    expected = {
        "token": tokens[:, 0],
        "avg": tokens[:, 1:].mean(1),
        "max": tokens[:, 1:].amax(1),
        "avgmax": (tokens[:, 1:].amax(1) + tokens[:, 1:].mean(1)) / 2,
        "": tokens,
    }[pool]
    model.reset_classifier(3, pool)
    torch.testing.assert_close(model(x), model.head(expected))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), expected)


def test_weight_and_layer_decay():
    model = make()
    no_decay, decay = param_groups_weight_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay()
    )
    ids = {id(p) for p in no_decay["params"]}
    assert {id(model.cls_token), id(model.pos_embed)} <= ids and decay["weight_decay"] == 0.05
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    # patches and positions, four blocks, norm and classifier
    assert len({group["lr_scale"] for group in groups}) == 6


BAD_OPTIONS = {
    "unknown attention mechanism 'quadratic'": {"attn_type": "quadratic"},
    "dim 64 does not divide into 5 heads": {"num_heads": 5},
    "unknown backend 'cuda'": {"attn_backend": "cuda"},
    "in_chans 0": {"in_chans": 0},
    "num_classes must be": {"num_classes": -1},
    "at least one block": {"depth": 0},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_option_is_named(message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_linear_deit", **BAD_OPTIONS[message])


def test_unknown_pooling_and_option():
    with pytest.raises(AssertionError, match="'median' is not supported; choose from"):
        timm.create_model("test_linear_deit", global_pool="median")
    with pytest.raises(AssertionError, match="'map' is not supported"):
        make().reset_classifier(3, "map")
    with pytest.raises(TypeError, match="window_size"):
        timm.create_model("test_linear_deit", window_size=7)
