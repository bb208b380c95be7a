"""Models with maps [B, C, H, W]: the same outputs, of steps that move little in memory."""

from __future__ import annotations

import json

import pytest
import torch

from tests.as_trained import make
from vitlinear.export.channels_first import rewrite

# Both attentions of a pyramid in few blocks, a norm in the gate, positions of the whole width.
MODELS = {
    "test_ravlt": {"depths": (1, 1, 1, 1)},
    "test_mavit": {"depths": (1, 1, 1, 1)},
    "test_nalaformer_linear": {"depths": (1, 1, 1, 1)},
    "test_mila": {"depths": (1, 1, 1, 1)},
}
# Every linear mechanism that a pyramid takes by its name.
MECHANISMS = ("elu", "relu", "inline", "l2", "lightnet", "identity")


@torch.no_grad()
def check(model):
    """Made for any size, and for one, in float64: what is left are roundings of another order."""
    made, rewritten = rewrite(model)
    assert str(rewritten) == "channels-first"
    for size in ((2, 3, 70, 97), (1, 3, 33, 64)):
        x = torch.randn(size, dtype=torch.float64)
        fixed, _ = rewrite(model, x)
        expected = model(x)
        for each in (made, fixed):
            torch.testing.assert_close(each(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs(name):
    check(make(name, **MODELS[name]))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_same_outputs_of_mechanisms(mechanism):
    check(make("test_ravlt", depths=(1, 1, 0, 0), attn_types=(mechanism,) * 4))


@torch.no_grad()
def test_the_model_stays_as_it_is():
    model = make("test_ravlt", **MODELS["test_ravlt"])
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(x)
    made, _ = rewrite(model)
    assert made is not model and torch.equal(model(x), expected)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "name, kwargs, layout",
    [
        ("test_linear_deit", {}, "channels-last, as LinearDeiT has no other form"),
        (
            "test_ravlt",
            {"attn_types": ("rala", "taylor", "softmax", "rala")},
            "channels-first in 3 of 4 stages, not in those of GatedMixerAttention",
        ),
    ],
)
def test_what_has_no_such_form(name, kwargs, layout):
    model = make(name, **kwargs)
    made, rewritten = rewrite(model)
    assert str(rewritten) == layout
    assert (made is model) == (rewritten.stages == 0)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-10)


def test_hooks_are_kept():
    """A block that somebody looks into is not what its class says: its stage stays."""
    model = make("test_ravlt", **MODELS["test_ravlt"])
    model.stages[1].blocks[0].register_forward_hook(lambda *args: None)
    assert str(rewrite(model)[1]).startswith("channels-first in 3 of 4 stages")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [pytest.param([], marks=pytest.mark.nightly), ["--height", "64", "--width", "96"]],
    ids=["any", "one"],
)
def test_command(sizes, command, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    result = command("export", "test_mavit", path, *sizes, "--model-kwargs", "depths=(1,0,1,0)")
    assert (result.code, result.err) == (0, "")
    assert "\nlayout        channels-first\n" in result.out and "classes, fused\n" in result.out
    metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert metadata["layout"] == "channels-first" and json.loads(metadata["fused"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["test_ravlt", "o.pt2"], "--layout channels-first is for --format onnx"),
        (["test_linear_deit", "o.onnx"], "it would be channels-last, as LinearDeiT has no other"),
    ],
)
def test_mistakes(flags, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("export", *flags, "--layout", "channels-first")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
