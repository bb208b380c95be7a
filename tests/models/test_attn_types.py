"""Pyramids with attentions that no family publishes them with."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.ops.inputs import ANY_LAYER
from tests.pairwise import pairwise
from vitlinear import ops
from vitlinear.layers import MapRotaryTables
from vitlinear.report import backend_report

FAMILIES = ("test_ravlt", "test_nalaformer")


def make(name: str, attn_type: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, attn_types=(attn_type,) * 4, **kwargs).eval()


@pairwise(every=2, name=FAMILIES, attn_type=[*ANY_LAYER, "softmax"])
def test_every_attention_trains(name, attn_type):
    """All attentions have the same parameters, but for the temperature of l2."""
    model, x = make(name, attn_type).train(), torch.randn(2, 3, 64, 96)
    assert {row.attn_type for row in backend_report(model)} == {attn_type}
    temperatures = {n for n, _ in model.named_parameters() if n.endswith("temperature")}
    assert len(temperatures) == (5 if attn_type == "l2" else 0)
    assert set(dict(model.named_parameters())) - temperatures == set(
        dict(make(name, "elu").named_parameters())
    )
    model(x).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert all(g.isfinite().all() for g in gradients.values())
    assert all(gradients[n].any() for n in temperatures)


@pytest.mark.parametrize("attn_type", ["lightnet", "l2"])
def test_script_and_export(attn_type):
    model, x = make("test_ravlt", attn_type, depths=(1, 0, 1, 0)), torch.randn(2, 3, 64, 96)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), expected)
    nodes = timm.models.create_feature_extractor(model, {"stages.2": "map"})
    assert nodes(x)["map"].shape == (2, 64, 4, 6)


def test_lightnet_gets_the_tables_of_its_own_encoding():
    x = torch.empty(1, 8, 3, 5)
    for ours, theirs in zip(
        MapRotaryTables(8, cosine=True)(x), ops.lrpe_tables(3, 5, 8), strict=True
    ):
        assert torch.equal(ours, theirs)
    stages = make("test_ravlt", "lightnet").stages
    assert all(stage.rotary.cosine for stage in stages)
    assert not any(stage.rotary.cosine for stage in make("test_ravlt", "rala").stages)
