"""Attentions of the registry in the pyramid and in the isotropic skeleton."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from vitlinear.dense.padding import padding
from vitlinear.mixers import list_attentions
from vitlinear.ops import MECHANISMS

# Those that the pyramids do not run in a layer of their own.
MIXERS = [name for name in list_attentions() if name not in (*MECHANISMS, "softmax")]


def pyramid(name: str = "test_ravlt", attention="mila", **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    types = (attention, attention, "softmax", "softmax")
    return timm.create_model(name, num_classes=7, attn_types=types, **kwargs).eval()


def isotropic(attention, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    kwargs = {"img_size": 64, "num_classes": 7, "depth": 2, **kwargs}
    return timm.create_model("test_linear_deit", attention=attention, **kwargs).eval()


@pytest.mark.parametrize("name", MIXERS)
def test_pyramid_trains(name):
    model, x = pyramid(attention=name).train(), torch.randn(1, 3, 64, 64)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", list_attentions())
def test_isotropic_trains(name):
    model, x = isotropic(name, depth=1).train(), torch.randn(1, 3, 64, 64)
    model(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert isinstance(model.blocks[0].attn.mixer.attn_type, str)


def test_rope_and_norms():
    x = torch.randn(1, 3, 64, 96)
    plain, turned = isotropic("mala"), isotropic("mala", rope=True, qk_norm=True)
    assert {n for n, _ in turned.named_parameters()} - {n for n, _ in plain.named_parameters()} == {
        f"blocks.{i}.attn.{which}_norm.weight" for i in range(2) for which in "qk"
    }
    assert turned(x).shape == plain(x).shape
    with pytest.raises(ValueError, match="give attention="):
        timm.create_model("test_linear_deit", rope=True)


def test_registry_and_own_layer_agree():
    """The same weights in the layer by name and in the family's own compute the same."""
    torch.manual_seed(0)
    own = timm.create_model("test_linear_deit", attn_type="rala", img_size=64, depth=2).eval()
    named = timm.create_model("test_linear_deit", attention="rala", img_size=64, depth=2).eval()
    named.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(named(x), own(x))


def test_padded_batches():
    """Padding of a batch does not reach the image, in pyramid and isotropic skeleton."""
    for model in (pyramid(attention="mila"), isotropic("mala")):
        images = torch.zeros(1, 3, 96, 96)
        images[:, :, :64, :64] = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            (single,) = model.forward_intermediates(
                images[:, :, :64, :64], indices=1, intermediates_only=True
            )
            with padding(model, (96, 96), [(64, 64)]):
                (padded,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
        height, width = single.shape[-2:]
        torch.testing.assert_close(padded[..., :height, :width], single)


def test_config_round_trip(tmp_path):
    """timm builds a model again from what it saved, options of the attention and all."""
    for number, model in enumerate((pyramid(attention="mila"), isotropic({"name": "mala"}))):
        arguments = (
            {"attn_types": ("mila", "mila", "softmax", "softmax"), "num_classes": 7}
            if number == 0
            else {"attention": {"name": "mala"}, "img_size": 64, "depth": 2, "num_classes": 7}
        )
        folder = tmp_path / str(number)
        timm.models.save_for_hf(model, folder, model_args=arguments)
        saved = json.loads((folder / "config.json").read_text())
        assert saved["model_args"]
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(again(x), model(x))


def test_timm_contract():
    """Feature extraction, another size and another classifier work as with any model."""
    model = isotropic("elu")
    model.set_input_size(96)
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    features = timm.create_model(
        "test_ravlt", features_only=True, attn_types=("mila", "mila", "elu", "softmax")
    )
    assert len(features(torch.randn(1, 3, 64, 64))) == 4
    nodes = timm.models.create_feature_extractor(pyramid(attention="vittt"), {"stages.1": "map"})
    assert nodes(torch.randn(1, 3, 64, 96))["map"].shape == (1, 48, 8, 12)


def test_mistakes():
    with pytest.raises(ValueError, match="unknown attention 'mia'.*did you mean"):
        pyramid(attention="mia")
    with pytest.raises(ValueError, match="mala has no option 'window'"):
        isotropic({"name": "mala", "window": 7})
    with pytest.raises(ValueError, match="rope is no option of mala"):
        isotropic({"name": "mala", "rope": True})
