"""Models with maps [B, C, H, W]: the same outputs, of steps that move little in memory."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.as_trained import make
from tests.pairwise import some_by_night
from vitlinear.errors import UserError
from vitlinear.export.channels_first import (
    ONNXRUNTIME,
    OPENVINO,
    RUNTIMES,
    InputSize,
    pays,
    rewrite,
    runtimes,
)
from vitlinear.export.shapes import Range, Shapes
from vitlinear.export.write import _trace, takes_channels_first

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
    "test_inline_swin": {"depths": (1, 1, 2, 0), "num_inline": (1, 1, 1, 0)},
    "test_inline_deit": {"depth": 1},
    "test_inline_cswin": SHALLOW,
    "test_pola_pvt": SHALLOW,
    "test_pola_swin": {"depths": (2, 1, 2, 0), "pola_window_size": 12, "window_size": 3},
    "test_vittt": {"depth": 1},
    "test_h_vittt": SHALLOW,
}
# Windows have the form at known sizes alone: that they fit, or reach beyond.
KNOWN = ((2, 70, 97), (None, 33, 64))
WINDOWED = {
    "test_l2vit": KNOWN,
    "test_inline_swin": ((2, 192, 128), (None, 64, 64), (2, 200, 70), (None, 70, 97)),
    "test_inline_cswin": ((2, 64, 96), (None, 128, 64), (2, 72, 80), (None, 132, 97)),
    "test_pola_swin": ((2, 96, 192), (None, 96, 96), (2, 100, 140), (None, 70, 97)),
}
# Every linear mechanism that a pyramid takes by its name.
MECHANISMS = ("elu", "relu", "inline", "l2", "lightnet", "identity")


@torch.no_grad()
def check(model, *sizes):
    """Of float64: what is left are roundings of another order.

    Args:
        model: To be rewritten.
        sizes: Of the inputs that it is made for; None for any.
    """
    for size in sizes:
        made, rewritten = rewrite(model, size)
        assert str(rewritten) == "channels-first"
        for batch, height, width in KNOWN if size is None else (size,):
            x = torch.randn(batch or 1, 3, height, width, dtype=torch.float64)
            torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs(name):
    sizes = [InputSize(*size) for size in WINDOWED.get(name, KNOWN)]
    check(make(name, **MODELS[name]), *sizes, *[None] * (name not in WINDOWED))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_same_outputs_of_mechanisms(mechanism):
    check(make("test_ravlt", depths=(1, 0, 0, 0), attn_types=(mechanism,) * 4), None)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_same_outputs_of_the_steps_of_a_runtime(runtime, name, monkeypatch):
    """All maps are large ones here, and all products of many channels."""
    monkeypatch.setattr(runtimes, "LARGE_MAP", 0)
    monkeypatch.setattr(runtimes, "MANY_CHANNELS", 1)
    model, size = make(name, **MODELS[name]), size_of(name)
    x = torch.randn(size.batch, 3, *size[1:], dtype=torch.float64)
    made, _ = rewrite(model, size, runtime)
    torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-10)
    if name not in WINDOWED:
        made, _ = rewrite(model, None, runtime)
        torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-10)


class Steps(TorchDispatchMode):
    """Counts operators by names, and 1x1 convolutions by the map [C, H, W] that they read."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.pointwise = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._opname] += 1
        if func._opname == "convolution" and args[1].shape[2:] == (1, 1):
            self.pointwise[tuple(args[0].shape[1:])] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_steps_by_runtime(monkeypatch):
    """Means by products for onnxruntime alone; products of large maps, in OpenVINO some of them."""
    model = make("test_ravlt", torch.float32, **SHALLOW)
    # Of the four stages, each with the map before the last product of its feed-forward network.
    maps = [(24, 32, 48), (48, 16, 24), (64, 8, 12), (96, 4, 6)]
    hidden = [(72, 32, 48), (144, 16, 24), (192, 8, 12), (288, 4, 6)]
    monkeypatch.setattr(runtimes, "LARGE_MAP", 4 * math.prod(maps[1]) - 1)
    monkeypatch.setattr(runtimes, "MANY_CHANNELS", 48)
    size = InputSize(1, 128, 192)

    def steps(size, runtime):
        made, _ = rewrite(model, size, runtime)
        with Steps() as steps:
            made(torch.randn(1, 3, 128, 192))
        return steps

    plain, products, means = (steps(size, runtime) for runtime in (None, ONNXRUNTIME, OPENVINO))
    assert {*maps, *hidden} <= plain.pointwise.keys()
    large = {maps[1], *hidden[:3]}
    assert plain.pointwise.keys() - products.pointwise.keys() == large
    assert products.counts["mm"] == sum(plain.pointwise[map_] for map_ in large) == 11
    assert products.counts["mean"] == plain.counts["mean"]
    assert steps(None, ONNXRUNTIME).pointwise == plain.pointwise  # maps of sizes not known

    norms = 2 * len(maps)
    of_attention = Counter(dict.fromkeys(maps[:2], 6))  # two of q and of k, one of v and gate
    assert plain.pointwise - means.pointwise == of_attention
    assert means.counts["mm"] == of_attention.total()
    assert steps(None, OPENVINO).pointwise == plain.pointwise
    assert means.counts["mean"] - plain.counts["mean"] == 2 * norms
    assert plain.counts["bmm"] - means.counts["bmm"] == 2 * norms


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


# What moves data in all blocks of a small model of `MODELS`. Transposes are of the last two axes
# before a product, which runtimes make part of it, but for two copies of each block in windows.
# Slices are of neighbours, where each sample has a kernel of its own.
MOVES = {
    "test_ravlt": {"Transpose": 20, "Concat": 4},
    "test_mavit": {"Transpose": 12, "Concat": 4},
    "test_nalaformer_linear": {"Transpose": 32},
    "test_mila": {"Transpose": 16},
    "test_inline_pvt": {"Transpose": 8},
    "test_lightnet": {"Transpose": 2},
    "test_linear_deit": {"Transpose": 2},
    "test_l2vit": {"Transpose": 12, "Slice": 4},
    "test_inline_swin": {"Transpose": 12, "Slice": 8, "Concat": 4},
    "test_inline_deit": {"Transpose": 2, "Slice": 1},
    "test_inline_cswin": {"Transpose": 12},
    "test_pola_pvt": {"Transpose": 32},
    "test_pola_swin": {"Transpose": 38, "Slice": 16, "Concat": 8},
    "test_vittt": {"Transpose": 4, "Slice": 12, "Concat": 1},
    "test_h_vittt": {"Transpose": 16, "Slice": 48, "Concat": 4},
}
# Nodes of ONNX in the same blocks, and around the tokens of LightNet and LinearDeiT; those that
# only name data anew too. Nothing else of `NODES` may appear.
COUNTS = {
    "test_ravlt": {"Reshape": 40, "Transpose": 18, "Concat": 4},
    "test_mavit": {"Reshape": 40, "Transpose": 12, "Concat": 4},
    "test_nalaformer_linear": {"Reshape": 48, "Transpose": 32},
    "test_mila": {"Reshape": 40, "Transpose": 16},
    "test_inline_pvt": {"Reshape": 60, "Transpose": 8},
    "test_lightnet": {"Reshape": 8, "Transpose": 4, "Squeeze": 1, "Unsqueeze": 1},
    "test_linear_deit": {"Reshape": 8, "Transpose": 4, "Squeeze": 1, "Unsqueeze": 1},
    "test_l2vit": {"Reshape": 44, "Slice": 4, "Transpose": 12},
    "test_inline_swin": {"Concat": 4, "Reshape": 62, "Slice": 8, "Transpose": 12},
    "test_inline_deit": {"Reshape": 15, "Slice": 1, "Transpose": 4, "Squeeze": 1, "Unsqueeze": 1},
    "test_inline_cswin": {"Reshape": 54, "Transpose": 12},
    "test_pola_pvt": {"Reshape": 40, "Transpose": 16},
    "test_pola_swin": {"Concat": 8, "Reshape": 65, "Slice": 16, "Transpose": 26},
    "test_vittt": {"Concat": 1, "Reshape": 16, "Slice": 12, "Transpose": 4},
    "test_h_vittt": {"Concat": 4, "Reshape": 56, "Slice": 48, "Transpose": 8},
}
NODES = ("Concat", "Split", "Slice", "Transpose", "Gather", "Squeeze", "Unsqueeze", "Reshape")
NODE_OF = {
    **dict.fromkeys(("cat", "stack"), "Concat"),
    **dict.fromkeys(("split", "split_with_sizes", "unbind"), "Split"),
    **dict.fromkeys(("slice", "select"), "Slice"),
    **dict.fromkeys(("transpose", "permute", "t"), "Transpose"),
    **dict.fromkeys(("index", "index_select", "gather"), "Gather"),
}


def size_of(name):
    """A size that the windows of the model fit."""
    return InputSize(*WINDOWED.get(name, ((2, 96, 64),))[0])


class Moves(TorchDispatchMode):
    """Counts operators that exporters make nodes of `NODE_OF`."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if node := NODE_OF.get(func._opname):
            self.counts[node] += 1
        if func._opname == "roll":  # along each axis
            self.counts.update({"Slice": 2 * len(args[2]), "Concat": len(args[2])})
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_few_moves(runtime, name):
    """Of small maps. How PyTorch multiplies a large map and a matrix is not what ONNX says."""
    size = size_of(name)
    made, _ = rewrite(make(name, torch.float32, **MODELS[name]), size, runtime)
    moves = Moves()
    for block in made.modules():
        if type(block).__name__ == "ChannelsFirstBlock":
            block.register_forward_pre_hook(lambda *args: moves.__enter__() and None)
            block.register_forward_hook(lambda *args: moves.__exit__(None, None, None))
    made(torch.randn(size.batch, 3, *size[1:]))
    assert dict(moves.counts) == MOVES[name]


@pytest.mark.slow
@torch.no_grad()
@some_by_night("name", MODELS, every_run=("test_linear_deit",))
@some_by_night("runtime", (None, *RUNTIMES), every_run=(ONNXRUNTIME,))
def test_few_nodes(runtime, name, monkeypatch):
    """All maps are large ones here, which are factors of matrix products."""
    monkeypatch.setattr(runtimes, "LARGE_MAP", 0)
    monkeypatch.setattr(runtimes, "MANY_CHANNELS", 1)
    size = size_of(name)
    shapes = Shapes.of(name, 3, *(Range(n, n) for n in size))
    made, _ = rewrite(make(name, torch.float32, **MODELS[name]), size, runtime)
    example = shapes.example()
    program = torch.onnx.export(
        _trace(made, shapes, example), (example,), dynamo=True, verbose=False
    )
    counts = Counter()
    for node in program.model_proto.graph.node:
        scopes = next(x.value for x in node.metadata_props if x.key == "pkg.torch.onnx.name_scopes")
        if "blocks." in scopes and node.op_type in NODES:
            counts[node.op_type] += 1
    expected = Counter(COUNTS[name])
    if runtime is not None:  # steps of a runtime name maps anew, or need not, and move no more
        del counts["Reshape"], expected["Reshape"]
    assert counts == expected


@pytest.mark.slow
@pytest.mark.compile
@some_by_night(
    "name", [name for name in MODELS if name not in WINDOWED], every_run=("test_inline_pvt",)
)
def test_programs_of_any_size(name):
    """Of models whose maps have sides that are rounded down, too."""
    made, _ = rewrite(make(name, torch.float32, **MODELS[name]))
    shapes = Shapes.of(name, 3, Range(1, 4096), Range(64, 4096), Range(64, 4096))
    example = shapes.example()
    program = _trace(made, shapes, example).module()
    x = torch.randn(2, 3, 99, 64)
    torch.testing.assert_close(program(x), made(x), rtol=1e-4, atol=1e-5)


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
    assert metadata["runtime"] == "onnxruntime"


def test_openvino_keeps_models_of_products():
    """It runs their own steps faster: without a layout that is asked for, it gets those."""
    names = ("test_linear_deit", "test_vittt", "test_inline_swin", "test_pola_pvt")
    layouts = {
        name: [takes_channels_first(make(name), "onnx", torch.float32, each) for each in RUNTIMES]
        for name in (*names, "test_ravlt", "test_inline_pvt", "test_h_vittt")
    }
    assert RUNTIMES == ("onnxruntime", "openvino")
    assert layouts == {name: [True, name not in names] for name in layouts}


def test_runtimes_that_there_are_not():
    model = make("test_linear_deit", depth=1)
    for call in (lambda: rewrite(model, None, "OpenVINO"), lambda: pays(model, "OpenVINO")):
        with pytest.raises(UserError, match=r"unknown runtime 'OpenVINO'.*: use one of onnxr"):
            call()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["test_ravlt", "o.pt2"], "--layout channels-first is for --format onnx"),
        (["test_ravlt", "o.onnx", "--dtype", "float16"], "channels-first has no form in float16"),
        (
            ["test_l2vit", "o.onnx"],
            "be channels-last, as PaddedWindowAttention at any size has no other",
        ),
        (
            ["test_ravlt", "o.onnx", "--runtime", "openvino"],
            "--runtime openvino is for --format onnx, --dtype float32 and --layout auto",
        ),
    ],
)
def test_mistakes(flags, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("export", *flags, "--layout", "channels-first")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
