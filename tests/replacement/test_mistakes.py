"""Mistakes and refusals: one line each, and the model as it was."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from tests.replacement.zoo import FAMILIES
from vitlinear import replace_attention
from vitlinear.replacement.attentions import ReplacedAttention
from vitlinear.replacement.blocks import select_blocks


def small_vit(**kwargs):
    return timm.create_model("test_vit", **kwargs)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("4:", [4, 5]),
        (":-4", [0, 1]),
        ("::3", [0, 3]),
        ("::-3", [2, 5]),
        ("0, -1", [0, 5]),
        (3, [3]),
        (slice(1, None, 2), [1, 3, 5]),
        ([2, 0, 2], [0, 2]),
    ],
)
def test_blocks_are_chosen_as_python_slices(blocks, chosen):
    assert select_blocks(blocks, 6) == chosen


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("6:", "blocks '6:' selects nothing: the model has blocks 0 to 5"),
        ([], "selects nothing"),
        ("3:3", "blocks '3:3' selects nothing"),
        ("::0", "step of a slice cannot be 0"),
        ("last", "must be a slice such as '6:' or numbers such as '0,3', got 'last'"),
        ("", "must be a slice"),
        (":-", "must be a slice"),
        ([6], "there is no block 6"),
        (-7, "there is no block -7"),
        ([True], "whole numbers or a slice, got True"),
        ([1.5], "whole numbers or a slice, got 1.5"),
        (3.0, "whole numbers or a slice, got 3.0"),
    ],
)
def test_blocks_that_there_are_not(blocks, message):
    with pytest.raises(ValueError, match=message) as caught:
        select_blocks(blocks, 6)
    assert "\n" not in str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mla"}, r"unknown attention 'mla' \(did you mean .*mala"),
        ({"name": "mala", "window": 3}, "mala has no option 'window'"),
        ({"name": "mala", "blocks": "9:"}, "selects nothing"),
        ({"name": "mala", "keep": ["gates"]}, r"no part 'gates' \(did you mean gate\?\)"),
        ({"name": "mala", "keep": 3}, "no part 3"),
        ({"name": "mala", "rope": "no"}, "rope must be True or False, got 'no'"),
        ({"name": None}, "unknown attention None"),
        ({"name": {"name": "mala"}}, "unknown attention {'name': 'mala'}"),
    ],
)
def test_mistakes_change_nothing(arguments, message):
    model = small_vit()
    with pytest.raises(ValueError, match=message) as caught:
        replace_attention(model, **arguments)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, ReplacedAttention) for module in model.modules())
    assert model.pretrained_cfg["architecture"] == "test_vit"
    assert "replacements" not in model._model_args


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet18", {}, "ResNet has no attention of timm's that could be replaced"),
        ("cait_xxs24_224", {"img_size": 64, "depth": 1}, r"\(talking heads\)"),
        ("xcit_nano_12_p16_224", {"img_size": 64, "depth": 1}, "between channels"),
        ("swinv2_cr_tiny_ns_224", {"img_size": 64, "depths": (1, 1, 1, 1)}, "cosine attention"),
        ("vit_small_patch16_18x2_224", {"img_size": 64, "depth": 1, "attn_layer": "diff"},
         "subtracts one softmax from another"),
        ("hiera_tiny_224", {}, "pools queries or keys"),
        ("levit_128s", {}, "levit.Attention is of a kind that there is no rule for"),
        ("beit_base_patch16_224", {"img_size": 64, "depth": 1},
         "table of biases to its logits, which mala has none of: leave 'bias' out of keep"),
    ],
)  # fmt: skip
def test_what_cannot_be_replaced_says_why(name, kwargs, message):
    model = timm.create_model(name, device="meta", **kwargs)
    with pytest.raises(ValueError, match=message) as caught:
        replace_attention(model, "mala")
    assert "\n" not in str(caught.value)


def test_a_class_derived_from_timms_is_refused_and_the_rest_replaced():
    class Scaled(timm.layers.Attention):
        pass

    model = small_vit()
    model.blocks[2].attn = old = Scaled(64, 2)
    report = replace_attention(model, "mala", "1:4")
    assert [row.block for row in report.replaced] == [1, 3]
    (refused,) = report.refused
    assert refused.name == "blocks.2.attn" and model.blocks[2].attn is old
    assert refused.reason == ("Scaled is derived from Attention, and may compute something else")
    table = str(report).splitlines()
    assert table[0].split() == ["block", "module", "was", "is", "without", "reason"]
    assert table[2].startswith("2      blocks.2.attn  Scaled     as it was")
    assert model._model_args["replacements"][0]["blocks"] == [1, 3]


def test_a_mixer_that_needs_the_map_is_refused_where_none_is_known():
    naflex = FAMILIES["naflexvit"].create()
    with pytest.raises(ValueError, match="mila needs the map of the tokens, which is not known"):
        replace_attention(naflex, "mila")
    with pytest.raises(ValueError, match="mala with rope needs the map"):
        replace_attention(naflex, "mala", rope=True)
    with pytest.raises(ValueError, match="delta needs the map"):
        replace_attention(naflex, "delta", form="scans_4")
    assert replace_attention(naflex, "delta").replaced
    dropping = small_vit(patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="patch dropout leaves none of it"):
        replace_attention(dropping, "mila")
    report = replace_attention(dropping, "mala")  # which does not ask for the map
    assert len(report.replaced) == 6
    with torch.no_grad():
        assert dropping.train()(torch.randn(2, 3, 160, 160)).isfinite().all()


def exchanged_forward(model):
    model.blocks[1].attn.forward = model.blocks[1].attn.forward


def another_projection(model):
    model.blocks[1].attn.proj = nn.Sequential(model.blocks[1].attn.proj)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.blocks[1].attn.register_forward_hook(print), "has hooks"),
        (lambda m: m.blocks[1].attn.register_full_backward_pre_hook(print), "has hooks"),
        (exchanged_forward, "has a forward of its own"),
        (another_projection, "has a Sequential as proj, which tells no weight"),
    ],
)
def test_what_was_done_to_an_attention_is_not_lost(change, reason):
    model = small_vit(device="meta")
    change(model)
    old = model.blocks[1].attn
    (refused,) = replace_attention(model, "elu").refused
    assert refused.block == 1 and refused.reason.startswith(reason)
    assert model.blocks[1].attn is old


def test_an_attention_alone_and_blocks_alone():
    model = small_vit(device="meta")
    with pytest.raises(ValueError, match="Attention is an attention itself.*the model that holds"):
        replace_attention(model.blocks[0].attn, "elu")
    with pytest.warns(UserWarning, match="give replace_attention the whole model"):
        replace_attention(model.blocks, "elu")
    assert model.pretrained_cfg["architecture"] == "test_vit"


def test_an_attention_with_centroids_is_refused_with_the_mask_of_swin():
    model = FAMILIES["swin"].create()
    with pytest.raises(ValueError, match="cannot learn its centroids: leave 'mask' out of keep"):
        replace_attention(model, "routing", 1, keep=["mask"])
    assert replace_attention(model, "routing", 1, keep=[]).replaced


def test_dropout_of_weights_is_reported():
    model = small_vit(attn_drop_rate=0.1, qk_norm=True)
    report = replace_attention(model, "mala", 0, keep=())
    assert report[0].dropped == ("qk_norm", "attn_drop")
    assert isinstance(model.blocks[0].attn.q_norm, nn.Identity)
    model.blocks[1].attn.attn_drop = nn.Identity()
    assert replace_attention(model, "mala", 1)[0].dropped == ()


def test_masks_that_say_more_than_which_keys_there_are():
    model = small_vit().eval()
    replace_attention(model, "mala")
    x = torch.randn(2, 3, 160, 160)
    tokens = 101
    hidden = torch.rand(2, 1, 1, tokens) < 0.3
    with torch.no_grad():
        added = model(x, attn_mask=torch.zeros_like(x[:, :1, :1, :1]).expand(hidden.shape)
                      .masked_fill(hidden, -torch.inf))  # fmt: skip
        torch.testing.assert_close(added, model(x, attn_mask=~hidden))
        assert (added - model(x)).abs().max() > 0
    with pytest.raises(ValueError, match="has no causal form"):
        model(x, is_causal=True)
    with pytest.raises(ValueError, match="takes a mask of keys"):
        model(x, attn_mask=torch.zeros(tokens, tokens))
    with pytest.raises(ValueError, match="not biases of logits"):
        model(x, attn_mask=torch.full((2, 1, 1, tokens), -0.5))
