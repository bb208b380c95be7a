"""Models of timm's families with replaced attentions."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.replacement.zoo import FAMILIES, features
from vitlinear import list_attentions, replace_attention
from vitlinear.mixers import find_mixer
from vitlinear.replacement.attentions import ReplacedAttention

# Of these, the ordinary run has every check; of the others, that softmax changes nothing.
FEW = ("vit, registers", "dinov3", "sapiens2", "naflexvit", "swin")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_in_the_place_of_softmax_changes_nothing(family):
    small = FAMILIES[family]
    model, x = small.create(), small.images()
    before, keys = features(model, x), dict(model.state_dict())
    report = replace_attention(model, "softmax", keep=small.keep)
    assert report.replaced and not report.refused
    assert {row.was for row in report} == set(small.classes)
    after = features(model, x)
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    # Keys stay, tables of biases excepted; and so do the parameters behind them.
    gone = keys.keys() - model.state_dict().keys()
    assert all("rel_pos" in key or "relative_position_bias" in key for key in gone), gone
    assert bool(gone) == (small.keep is not None)
    assert model.state_dict().keys() <= keys.keys()
    for key, value in model.state_dict().items():
        assert value.data_ptr() == keys[key].data_ptr(), key


@pytest.mark.parametrize(
    "family",
    [
        family if family in FEW else pytest.param(family, marks=pytest.mark.nightly)
        for family in FAMILIES
    ],
)
def test_a_linear_attention_trains_in_its_place(family):
    small = FAMILIES[family]
    model, x = small.create(), small.images(3)
    frozen = next(name for name, _ in model.named_parameters() if "attn" in name and "proj" in name)
    model.get_parameter(frozen).requires_grad_(False)
    report = replace_attention(model, "l2", "1:", small.keep)  # which learns a scale for each head
    assert all(row.block >= 1 for row in report)
    assert not model.get_parameter(frozen).requires_grad
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    copied = copy.deepcopy(model)
    model.train()
    model(x).square().mean().backward()
    for name, module in model.named_modules():
        if isinstance(module, ReplacedAttention):
            for key, parameter in module.named_parameters(name):
                if key != frozen:
                    assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    with torch.no_grad():  # a copy is a model of its own
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(copied(x), together)


@pytest.mark.parametrize("family", ["dinov3", pytest.param("swin", marks=pytest.mark.nightly)])
def test_every_attention_of_the_registry(family):
    """One after another in the same place."""
    small = FAMILIES[family]
    model, x = small.create(), small.images()
    for name in list_attentions():
        if family == "swin" and find_mixer(name).moves_in_training:
            continue  # refused with its mask
        (row,) = replace_attention(model, name, 1, small.keep)
        attention = model.get_submodule(row.name)
        assert row.attention == attention.mixer.attn_type == name
        model.zero_grad()
        out = model.train()(x)
        out.square().mean().backward()
        assert out.isfinite().all(), name
        for key, parameter in attention.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (name, key)
    made = len(list_attentions()) - (family == "swin")
    assert len(model._model_args["replacements"]) == made


@pytest.mark.parametrize(
    ("family", "at"),
    [("vit, registers", torch.bfloat16), ("dinov3", torch.float16), ("swin", torch.bfloat16)],
)
def test_other_types_and_autocast(family, at):
    small = FAMILIES[family]
    model, x = small.create(), small.images()
    replace_attention(model, "mala", keep=small.keep)
    expected = features(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = features(model, x)
    assert (cast.float() - expected).std() < 0.1 * expected.std()
    half = features(model.to(at), x.to(at))
    assert half.dtype == at
    assert (half.float() - expected).std() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("family", "kwargs", "keep", "common"),
    [
        ("relpos", {"shared_rel_pos": True}, ("qk_norm",), "shared_rel_pos"),
        ("beit", {"use_shared_rel_pos_bias": True}, (), "rel_pos_bias"),
        ("rope, mixed", {}, (), "rope"),
    ],
)
def test_what_no_attention_uses_any_more_asks_for_no_gradient(family, kwargs, keep, common):
    """Data-parallel training would wait for one."""
    small = FAMILIES[family]
    model = small.create(**kwargs)
    replace_attention(model, "elu", "1:", keep)
    assert all(p.requires_grad for p in getattr(model, common).parameters())
    replace_attention(model, "elu", 0, keep)
    model(small.images()).square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    assert any(name.startswith(common) for name, _ in model.named_parameters())


def test_a_separate_bias_leaves_the_projection_its_hooks():
    """timm calls the module where it adds the bias apart."""
    small = FAMILIES["eva02"]
    model = small.create(depth=1)
    model.blocks[0].attn.qkv_bias_separate = True
    called = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: called.append(1))
    x = small.images(1)
    before = features(model, x)
    replace_attention(model, "softmax")
    torch.testing.assert_close(features(model, x), before, rtol=1e-4, atol=1e-4)
    assert len(called) == 2


def test_blocks_with_one_attention_in_common():
    model, x = FAMILIES["vit"].create(), FAMILIES["vit"].images(1)
    model.blocks[3].attn = model.blocks[1].attn
    model.blocks[5] = model.blocks[4]
    for chosen in ("3:", "5"):
        with pytest.raises(ValueError, match="have one attention in common"):
            replace_attention(model, "l2", chosen)
    assert [row.block for row in replace_attention(model, "l2", "1,3,4,5")] == [1, 3, 4, 5]
    assert model.blocks[3].attn is model.blocks[1].attn and model.blocks[5] is model.blocks[4]
    replaced = [isinstance(block.attn, ReplacedAttention) for block in model.blocks]
    assert replaced == [False, True, False, True, True, True]
    assert features(model, x).isfinite().all()
