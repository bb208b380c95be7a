"""Models into which somebody put other modules: programs compute the same, or keep their steps."""

from __future__ import annotations

import pytest
import torch
from timm.layers import LayerNorm
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tests.as_trained import make
from tests.export.test_channels_first import MODELS, size_of
from vitlinear.export.channels_first import rewrite

NAMES = ("test_mavit", "test_l2vit", "test_inline_swin", "test_h_vittt")


def places(model, kind):
    """One of each: modules of one class under one name, in modules of one class."""
    found = {}
    for name, module in model.named_modules():
        for child, part in module.named_children():
            if isinstance(part, kind):
                found.setdefault((type(module), child), f"{name}.{child}".lstrip("."))
    return list(found.values())


@torch.no_grad()
def check(name, change):
    """Of one model as `change` leaves it; returns what was rewritten."""
    model, size = make(name, **MODELS[name]), size_of(name)
    change(model)
    x = torch.randn(size.batch, 3, *size[1:], dtype=torch.float64)
    made, rewritten = rewrite(model, size)
    torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-10)
    return str(rewritten)


@pytest.mark.parametrize("name", NAMES)
def test_gelus_that_are_approximated_stay_so(name):
    for place in places(make(name, **MODELS[name]), nn.GELU):

        def change(model, place=place):
            model.set_submodule(place, nn.GELU("tanh"))

        layout = check(name, change)
        assert ("GELU that is approximated" in layout) == ("blocks." in place), place


def test_an_activation_behind_one_that_was_folded():
    def change(model):
        model.fuse().stages[1].blocks[0].mlp.act = nn.SiLU()

    assert check("test_mavit", change) == "channels-first in 3 of 4 stages, not in those of SiLU"


@pytest.mark.parametrize("name", (*NAMES, "test_pola_pvt"))
def test_layers_that_lost_their_bias(name):
    def change(model):
        for module in model.modules():
            if isinstance(module, nn.Linear | _ConvNd):
                module.bias = None

    left = "not in those of TokenConv without bias" in check(name, change)
    assert left == (name == "test_inline_swin")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lost", [("bias",), ("weight", "bias")], ids=" and ".join)
def test_norms_that_lost_their(lost, name):
    for place in places(make(name, **MODELS[name]), nn.LayerNorm):

        def change(model, place=place):
            for parameter in lost:
                setattr(model.get_submodule(place), parameter, None)

        part_of_others = isinstance(make(name, **MODELS[name]).get_submodule(place), LayerNorm)
        left = "LayerNorm without weight or bias" in check(name, change)
        assert left == (part_of_others and place.startswith("stages.")), place
