"""Models with maps [B, C, H, W]: the same outputs, of steps that move little in memory."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from tests.as_trained import make
from vitlinear.export.channels_first import InputSize, rewrite
from vitlinear.export.shapes import Range, Shapes
from vitlinear.export.write import _trace

SHALLOW = {"depths": (1, 1, 1, 1)}
MODELS = {
    "test_ravlt": SHALLOW,
    "test_mavit": SHALLOW,
    "test_nalaformer_linear": SHALLOW,
    "test_mila": SHALLOW,
    "test_inline_pvt": SHALLOW,
    "test_lightnet": {"depth": 1},
    "test_linear_deit": {"depth": 1},
    "test_l2vit": {"depths": (2, 2, 0, 0)},
    "test_inline_swin": {"depths": (1, 1, 1, 0), "inline_window_size": 56},
}
ONE_SIZE = ("test_l2vit", "test_inline_swin")  # their windows have the form at a known size alone
# Every linear mechanism that a pyramid takes by its name.
MECHANISMS = ("elu", "relu", "inline", "l2", "lightnet", "identity")


@torch.no_grad()
def check(model, any_size=True):
    """Made for any size, and for one, in float64: what is left are roundings of another order."""
    for size in ((2, 3, 70, 97), (1, 3, 33, 64)):
        x = torch.randn(size, dtype=torch.float64)
        expected = model(x)
        known = [InputSize(None, *size[2:]), InputSize(size[0], *size[2:])]
        for each in [None, *known] if any_size else known:
            made, rewritten = rewrite(model, each)
            assert str(rewritten) == "channels-first"
            torch.testing.assert_close(made(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs(name):
    check(make(name, **MODELS[name]), name not in ONE_SIZE)


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
        ("test_vittt", {"depth": 1}, "channels-last, as PositionedTokenBlock has no other form"),
        (
            "test_linear_deit",
            {"attention": "taylor", "depth": 1},
            "channels-last, as MixerAttention has no other form",
        ),
        (
            "test_l2vit",
            SHALLOW,
            "channels-last, as PaddedWindowAttention at any size has no other form",
        ),
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


# Nodes of ONNX that move data or only name it anew, in all blocks of a small model of `MODELS`.
# Transposes are of the last two axes before a product, which runtimes make part of it; those of
# L2ViT's windows are copies. Nothing else may appear.
MOVES = ("Concat", "Split", "Slice", "Transpose", "Gather", "Squeeze", "Unsqueeze", "Reshape")
COUNTS = {
    "test_ravlt": {"Reshape": 24, "Transpose": 18, "Concat": 4},
    "test_mavit": {"Reshape": 24, "Transpose": 12, "Concat": 4},
    "test_nalaformer_linear": {"Reshape": 24, "Transpose": 32},
    "test_mila": {"Reshape": 24, "Transpose": 16},
    "test_inline_pvt": {"Reshape": 44, "Transpose": 8},
    "test_lightnet": {"Reshape": 5, "Transpose": 4, "Squeeze": 1, "Unsqueeze": 1},
    "test_linear_deit": {"Reshape": 4, "Transpose": 4, "Squeeze": 1, "Unsqueeze": 1},
    "test_l2vit": {"Reshape": 24, "Transpose": 16, "Slice": 4},
    "test_inline_swin": {"Reshape": 33, "Transpose": 6},
}
COUNTED_IN_EVERY_RUN = ("test_ravlt", "test_lightnet")


FIXED = (Range(2, 2), Range(96, 96), Range(64, 64))


def moves(name):
    """Blocks of a small model, and their nodes that move data."""
    model, shapes = make(name, torch.float32, **MODELS[name]), Shapes.of(name, 3, *FIXED)
    made, _ = rewrite(model, InputSize(2, 96, 64))
    example = shapes.example()
    with torch.no_grad():
        program = torch.onnx.export(
            _trace(made, shapes, example), (example,), dynamo=True, verbose=False
        )
    counts = Counter()
    for node in program.model_proto.graph.node:
        scopes = next(x.value for x in node.metadata_props if x.key == "pkg.torch.onnx.name_scopes")
        if "blocks." in scopes and node.op_type in MOVES:
            counts[node.op_type] += 1
    return dict(counts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in COUNTED_IN_EVERY_RUN else pytest.mark.nightly)
        for name in COUNTS
    ],
)
def test_few_moves(name):
    assert moves(name) == COUNTS[name]


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
        (
            ["test_vittt", "o.onnx"],
            "be channels-last, as PositionedTokenBlock has no other",
        ),
    ],
)
def test_mistakes(flags, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("export", *flags, "--layout", "channels-first")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
