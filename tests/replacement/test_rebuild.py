"""A replaced model is saved by timm, and built again by it."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.models import resolve_model_input_args, save_for_hf
from torch import nn

import vitlinear
from tests.replacement.zoo import FAMILIES, randomised
from vitlinear import replace_attention


@pytest.mark.parametrize(
    ("family", "resized", "arguments"),
    [
        ("vit", (96, 128), {"blocks": "4:", "rope": True}),
        ("dinov3", None, {}),
        ("swin", (96, 64), {"blocks": [1, 2], "keep": ("mask",)}),
        pytest.param("beit", (80, 64), {"keep": ()}, marks=pytest.mark.nightly),
        pytest.param("relpos", (96, 80), {"keep": ()}, marks=pytest.mark.nightly),
        pytest.param("deit, distilled", None, {"blocks": "::2"}, marks=pytest.mark.nightly),
        pytest.param("naflexvit", None, {}, marks=pytest.mark.nightly),
        pytest.param("pit", None, {}, marks=pytest.mark.nightly),
        pytest.param("sam", None, {"keep": ()}, marks=pytest.mark.nightly),
    ],
)
def test_timm_saves_it_and_builds_it_again(family, resized, arguments, tmp_path):
    torch.manual_seed(0)
    small = FAMILIES[family]
    model = small.create()
    replace_attention(model, "mala", **arguments)
    randomised(model)
    if resized:
        model.set_input_size(resized)
    x = torch.randn(2, 3, *(resized or (small.size, small.size)))
    save_for_hf(model, str(tmp_path / "first"), safe_serialization=True)
    saved = json.loads((tmp_path / "first" / "config.json").read_text())
    assert saved["architecture"] == "replaced_attention"
    assert saved["model_args"]["base"] == small.name
    source = f"local-dir:{tmp_path / 'first'}"
    again = timm.create_model(source, pretrained=True).eval()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(again(x), expected)
    # And once more, from what was built.
    save_for_hf(again, str(tmp_path / "second"), safe_serialization=True)
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == saved
    assert timm.create_model(source, pretrained=True, num_classes=3).num_classes == 3
    # As timm gives features, with the weights.
    if family == "sam":
        return  # whose features timm makes at 1024 pixels' grid
    maps = timm.create_model(source, pretrained=True, features_only=True).eval()
    assert maps.pretrained_cfg["architecture"] == "replaced_attention"
    with torch.no_grad():
        given = maps(x)
        if not hasattr(model, "forward_intermediates"):
            return
        expected = model.forward_intermediates(
            x, indices=list(maps.feature_info.out_indices), intermediates_only=True
        )
    for one, other in zip(given, expected, strict=True):
        if one.shape != other.shape:
            one = one.permute(0, 3, 1, 2)
        torch.testing.assert_close(one, other)


def test_several_replacements_are_made_again_in_order(tmp_path):
    model = FAMILIES["vit"].create()
    replace_attention(model, "mala", ":4")
    replace_attention(model, "l2", "3:", rope=True)  # one of them for the second time
    randomised(model)
    assert model.blocks[3].attn.mixer.attn_type == "l2"
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    assert again.blocks[3].attn.was == "Attention"


def test_models_inside_of_others_are_told(tmp_path):
    """Each model of the factory, with the numbers of its own blocks."""
    first, second = FAMILIES["vit"].create(), FAMILIES["vit, registers"].create()
    outer = nn.Module()
    outer.rows, outer.first, outer.second = first.blocks, first, nn.DataParallel(second)
    replace_attention(outer, "mhla", "5:8", blocks_per_side=2)
    assert first._model_args["replacements"][0]["blocks"] == [5]
    assert second._model_args["replacements"][0]["blocks"] == [0, 1]
    save_for_hf(second, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), second(x))


@pytest.mark.parametrize(
    ("family", "kwargs", "size"),
    [
        ("vit, registers", {"img_size": 96}, 96),
        ("beit", {"img_size": 96}, 96),
        pytest.param(
            "vit, registers", {"img_size": 64, "patch_size": 8}, 64, marks=pytest.mark.nightly
        ),
    ],
)
def test_saved_weights_fit_another_size(family, kwargs, size, tmp_path):
    small = FAMILIES[family]
    model = small.create()
    replace_attention(model, "elu", "1:", keep=())
    randomised(model)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **kwargs).eval()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert again(x).isfinite().all()
        if "patch_size" not in kwargs:
            model.set_input_size((size, size))
            torch.testing.assert_close(again(x), model(x))


def test_models_that_give_maps_are_replaced_as_well():
    maps = FAMILIES["naflexvit"].create(features_only=True, out_indices=[1, 2])
    report = replace_attention(maps, "mala")
    assert [row.name for row in report] == [f"model.blocks.{i}.attn" for i in range(3)]
    assert maps.model.use_key_only_attn_mask
    rotary = FAMILIES["dinov3"].create(features_only=True, out_indices=[1])
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (before,) = rotary(x)
        replace_attention(rotary, "softmax")
        torch.testing.assert_close(rotary(x)[0], before, rtol=1e-4, atol=1e-4)


def test_weights_of_the_base_are_loaded_before(tmp_path):
    base = FAMILIES["vit"].create()
    torch.save(base.state_dict(), tmp_path / "base.pth")
    model = timm.create_model(
        "replaced_attention",
        base="test_vit",
        replacements=[{"attention": "l2"}],
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "base.pth"), "num_classes": 7},
    )
    weights = model.state_dict()
    for key, value in base.state_dict().items():
        assert torch.equal(weights[key], value), key
    assert weights.keys() - base.state_dict().keys() == {
        f"blocks.{i}.attn.mixer.temperature" for i in range(6)
    }


def test_by_name_the_base_is_built_and_changed():
    model = timm.create_model(
        "replaced_attention",
        base="test_vit.r160_in1k",
        replacements=[{"attention": "mala", "blocks": "2:"}],
        num_classes=5,
        device="meta",
    )
    assert model.num_classes == 5 and model.pretrained_cfg["tag"] == "r160_in1k"
    assert [hasattr(block.attn, "mixer") for block in model.blocks] == [False] * 2 + [True] * 4
    # As scripts of timm's ask for it, of another size; the means are those of the base.
    replacements = [{"attention": "mala"}]
    asked = resolve_model_input_args(
        "replaced_attention", {"img_size": 32}, base="vit_tiny_patch16_224", depth=1,
        replacements=replacements,
    )  # fmt: skip
    sized = timm.create_model(**asked)
    assert sized.patch_embed.img_size == (32, 32) and sized.pretrained_cfg["mean"] == (0.5,) * 3
    # A model that the factory did not make is replaced as well, and cannot be saved, as before.
    plain = timm.models.VisionTransformer(img_size=32, embed_dim=16, num_heads=2, depth=1)
    assert replace_attention(plain, "mala").replaced and not hasattr(plain, "_model_args")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs base=NAME and replacements"),
        ({"base": "test_vitt"}, r"unknown base 'test_vitt' \(did you mean test_vit"),
        ({"base": "replaced_attention"}, "unknown base 'replaced_attention'"),
        ({"base": "test_vit", "replacements": [{"attention": "mla"}]}, "unknown attention 'mla'"),
        *(
            ({"base": "test_vit", "replacements": given}, message)
            for given, message in (
                (None, "replacements must be a list of mappings, at least one"),
                ({"attention": "mala"}, "replacements must be a list of mappings"),
                (["mala"], "must be a mapping with 'attention'.*got 'mala'"),
                ([{"name": "mala"}], "must be a mapping with 'attention'"),
                ([{"attention": None}], "unknown attention None"),
                ([{"attention": "mala", "block": 3}], r"no 'block' \(did you mean blocks"),
                (
                    [{"attention": "mala", "options": 3}],
                    "options of a replacement must be",
                ),
                ([{"attention": "mala", "blocks": 3.0}], "whole numbers or a slice, got 3.0"),
            )
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        timm.create_model("replaced_attention", **arguments)
    assert "\n" not in str(caught.value)


def test_weights_of_it_are_loaded_by_name(tmp_path):
    from vitlinear.create import build_model

    kwargs = {"base": "test_vit", "replacements": [{"attention": "mala", "blocks": "2:"}]}
    model = build_model("replaced_attention", num_classes=3, **kwargs)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    loaded = vitlinear.load(path, model="replaced_attention", model_kwargs=kwargs, num_classes=3)
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x))
