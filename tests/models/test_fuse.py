"""Folding for inference: the same outputs from fewer modules."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from timm.layers import LayerScale
from torch import nn

from tests.pairwise import siblings_by_night
from vitlinear.layers import LocalConcentration, ResidualDepthwiseConv

TEST_MODELS = [
    name
    for name in timm.list_models("test_*")
    if timm.model_entrypoint(name).__module__.startswith("vitlinear.")
]
# The others have no modules that fuse() could do without.
FOLDS = [n for n in TEST_MODELS if not re.search("inline|deit|lightnet|pola", n)]


def trained(name: str, dtype: torch.dtype = torch.float64, **kwargs) -> nn.Module:
    """The model in eval mode, its statistics and scales far from their initial values."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, LayerScale):
            nn.init.normal_(module.gamma)
    return model.eval().to(dtype)


@siblings_by_night(TEST_MODELS)
@torch.no_grad()
def test_same_outputs(name):
    model = trained(name)
    images = torch.randn(2, 3, 96, 130, dtype=torch.float64)
    expected = model(images)
    torch.testing.assert_close(model.fuse()(images), expected, rtol=1e-11, atol=1e-11)


@siblings_by_night(TEST_MODELS)
@torch.no_grad()
def test_same_outputs_in_single_precision(name):
    model = trained(name, torch.float32)
    images = torch.randn(2, 3, 96, 130)
    expected = model(images)
    torch.testing.assert_close(model.fuse()(images), expected, rtol=1e-4, atol=1e-4)


@siblings_by_night(FOLDS)
def test_nothing_is_left_to_fold(name):
    model = trained(name).fuse()
    concentrations = sum(isinstance(m, LocalConcentration) for m in model.modules())
    # Behind the last stage one of its own has no convolution before it.
    alone = isinstance(getattr(model, "final", None), nn.BatchNorm2d)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == concentrations + alone
    assert not any(isinstance(m, LayerScale | ResidualDepthwiseConv) for m in model.modules())


@siblings_by_night(FOLDS)
@torch.no_grad()
def test_reparameterize_model_of_timm(name):
    model = trained(name)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    fused = timm.utils.reparameterize_model(model)
    before, after = ([type(m) for m in x.modules()] for x in (model, fused))
    assert after != before and len(after) <= len(before)
    torch.testing.assert_close(fused(images), model(images), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "name, depths",
    [
        ("test_ravlt", (1, 0, 1, 0)),
        ("test_nalaformer", (1, 0, 1, 0)),
        ("test_l2vit", (1, 0, 2, 0)),
    ],
)
@torch.no_grad()
def test_fused_models_script_and_export(name, depths):
    """One block of each kind is enough."""
    model = trained(name, torch.float32, depths=depths).fuse()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    torch.testing.assert_close(torch.jit.script(model)(images), expected)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), expected)


def test_features_of_a_fused_backbone():
    model = trained("test_ravlt")
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model.forward_intermediates(images, intermediates_only=True)
    fused = model.fuse().forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(fused, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["test_ravlt", "test_linear_deit"])
def test_training_mode_is_refused(name):
    with pytest.raises(ValueError, match="eval mode"):
        timm.create_model(name).fuse()


@siblings_by_night(FOLDS)
@torch.no_grad()
def test_nothing_of_the_caller_is_written_to(name):
    """A state dict from before, and a model that lent its weights."""
    model = trained(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    held, other = model.state_dict(), trained(name)
    other.load_state_dict(held, assign=True)
    other.fuse()
    assert all(torch.equal(held[key], before[key]) for key in before)
    assert all(p.requires_grad for p in other.parameters())


@torch.no_grad()
def test_hooks_on_a_folded_gelu():
    model, calls = trained("test_ravlt", torch.float32).fuse(), []
    for part in model.stem.conv1:
        part.register_forward_hook(lambda *args: calls.append(1))
    model(torch.randn(1, 3, 32, 32))
    assert len(calls) == 2
