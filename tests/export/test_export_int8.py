"""``vitlinear export --dtype int8``: products with weights are int8, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from tests.as_trained import make
from tests.export.test_channels_first import MODELS
from tests.pairwise import some_by_night
from vitlinear.errors import UserError
from vitlinear.export import FORMATS, quantise
from vitlinear.export.calibration import HELD_OUT, Calibration
from vitlinear.export.channels_first import CHANNELS_LAST, OPENVINO, InputSize, rewrite
from vitlinear.export.shapes import Range, Shapes
from vitlinear_cli import main

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

MODEL = "test_linear_deit"  # the quickest to trace
DEPTH = 2
CALIBRATE = ["--dtype", "int8", "--data-dir"]


@pytest.fixture(scope="module")
def written(images, tmp_path_factory):
    """A model with random weights, and it as an int8 program of images of many sizes."""
    folder = tmp_path_factory.mktemp("int8")
    weights, path = folder / "weights.safetensors", folder / "int8.onnx"
    flags = [MODEL, path, "--checkpoint", weights, *CALIBRATE, images, "--calibration-images", 20]
    flags += ["--layout", "channels-last"]
    sizes = ["--batch", "1:8", "--height", "48:320", "--width", "48:320"]
    kwargs = ["--num-classes", "7", "--model-kwargs", f"depth={DEPTH}"]
    assert main(["export", MODEL, str(weights), *kwargs]) == 0
    assert main(["export", *(str(flag) for flag in [*flags, *sizes])]) == 0
    model = timm.create_model(MODEL, checkpoint_path=weights, num_classes=7, depth=DEPTH).eval()
    return model, path


def test_graph(written):
    model, path = written
    assert b".py" not in path.read_bytes()
    graph = onnx.load(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def source(name):
        """Which kind of node an input is from, and the integers of a constant."""
        node = made_by.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        return constants.get(node.input[0], made_by.get(node.input[0]))

    sources = {
        kind: [[source(name) for name in n.input] for n in graph.node if n.op_type == kind]
        for kind in ("MatMul", "Gemm", "Conv")
    }
    quantised = sources["Gemm"] + [row for row in sources["MatMul"] if row[1] is not None]
    assert len(quantised) == 4 * DEPTH + 1
    # States and what they give: three products of two activations in each block.
    assert [row for row in sources["MatMul"] if row[1] is None] == 3 * DEPTH * [[None, None]]
    assert sources["Conv"] == [[None, None]]  # patches of 16 x 16, of the images
    for activation, weight, *_ in quantised:
        assert activation.op_type == "QuantizeLinear"
        assert weight.dtype == np.int8 and np.abs(weight).max() == 64
        assert constants[activation.input[2]] == 128  # one that is not makes OpenVINO subtract it
    products = quantise.projections(model, 3)
    assert sum(weight.size for _, weight, *_ in quantised) == sum(
        module.weight.numel() for module in products
    )
    weights = 4 * sum(p.numel() for p in model.parameters())
    saved = 3 * sum(module.weight.numel() for module in products)
    assert sum(array.nbytes for array in constants.values()) < weights - saved + 30_000  # scales
    others = {n.op_type for n in graph.node} - {"QuantizeLinear", "DequantizeLinear"}
    assert not any("Integer" in kind or "QLinear" in kind for kind in others)


def test_any_size(written, images):
    model, path = written
    session = onnxruntime.InferenceSession(path)
    (inputs,), metadata = session.get_inputs(), session.get_modelmeta().custom_metadata_map
    assert (inputs.type, inputs.shape) == ("tensor(float)", ["batch", 3, "height", "width"])
    assert json.loads(metadata["num_classes"]) == 7 and metadata["dtype"] == "int8"
    assert metadata["calibration"] == f"20 images of {images}"
    assert metadata["float32"].startswith("1 convolution of images, ")
    assert f"{3 * DEPTH} products of two activations" in metadata["float32"]
    assert f"{2 * DEPTH + 1} norms" in metadata["float32"].split(", ")
    mean, std = (torch.tensor(json.loads(metadata[key])).view(3, 1, 1) for key in ("mean", "std"))
    torch.manual_seed(0)
    for size in ((1, 3, 48, 320), (5, 3, 101, 229)):
        x = 40 * torch.rand(size)  # as `image_folder` draws them
        x[:, 1] += 200
        x = (x / 255 - mean) / std
        (logits,) = session.run(None, {"images": x.numpy()})
        (one,) = session.run(None, {"images": x[:1].numpy()})
        with torch.no_grad():
            expected = model(x)
        assert 0 < (torch.from_numpy(logits) - expected).norm() < 0.1 * expected.norm()
        # Ranges are fixed: the images beside it change nothing but the order of float32 sums.
        np.testing.assert_allclose(one[0], logits[0], atol=1e-2 * np.abs(logits).max())


def graph_of(kind, weight=None, first=None, **attributes):
    """A graph of one node, with constants of given shapes."""
    node = onnx.helper.make_node(kind, ["a", "b"], ["c"], name="product", **attributes)
    constants = [
        onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name)
        for name, shape in (("a", first), ("b", weight))
        if shape
    ]
    return onnx.helper.make_graph([node], "graph", [], [], constants)


@pytest.mark.parametrize(
    "graph, quantised",
    [
        (graph_of("MatMul", (4, 4)), True),
        (graph_of("Gemm", (4, 4), transB=1), True),
        (graph_of("Conv", (4, 4, 1, 1)), True),
        (graph_of("Conv", (4, 4, 3, 3)), True),
        (graph_of("Conv", (4, 1, 3, 3), group=4), True),
        (graph_of("Conv", (4, 3, 3, 3)), False),  # of the images
        (graph_of("Conv"), False),
        (graph_of("MatMul", (2, 4, 4)), False),
        (graph_of("MatMul"), False),
        (graph_of("MatMul", first=(4, 4)), False),
        (graph_of("MatMul", (4, 4), first=(4, 4)), False),
        (graph_of("Mul", (4, 4)), False),
    ],
)
def test_products(graph, quantised):
    assert [node.name for node in quantise.products(graph, 3)] == ["product"] * quantised


def test_runs_in_integers(written, images, command, tmp_path):
    """Also at fixed sizes, where onnxruntime joins products and biases that it can."""
    fixed, folder = tmp_path / "fixed.onnx", written[1].parent
    flags = [MODEL, fixed, "--checkpoint", folder / "weights.safetensors", *CALIBRATE, images]
    flags += ["--calibration-images", 12, "--batch", 1, "--height", 64, "--width", 96]
    assert command("export", *flags, "--layout", "channels-last").code == 0
    for path in (written[1], fixed):
        kinds = run_kinds(path, tmp_path)
        assert kinds.count("QGemm") == 4 * DEPTH + 1
        assert "Gemm" not in kinds


def test_maps_run_in_integers(written, images, command, tmp_path):
    """Where maps are channels-first, products are convolutions."""
    path, folder = tmp_path / "maps.onnx", written[1].parent
    flags = [MODEL, path, "--checkpoint", folder / "weights.safetensors", *CALIBRATE, images]
    flags += ["--calibration-images", 12, "--batch", 1, "--height", 64, "--width", 96]
    assert command("export", *flags, "--layout", "channels-first").code == 0
    kinds = run_kinds(path, tmp_path)
    assert kinds.count("QLinearConv") == 6 * DEPTH  # q, k, v, their projection, two of the MLP
    assert kinds.count("Conv") == 1  # patches of the images
    metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert f"{2 * DEPTH + 1} norms" in metadata["float32"].split(", ")
    assert "other products" not in metadata["float32"]


NAMES = ("test_linear_deit", "test_lightnet", "test_inline_deit", "test_ravlt", "test_vittt")


@pytest.mark.slow
@some_by_night("name", NAMES, every_run=("test_linear_deit",))
@pytest.mark.parametrize("size", [None, InputSize(2, 96, 64)], ids=["any", "one"])
@some_by_night("form", (None, OPENVINO, CHANNELS_LAST), every_run=(None, OPENVINO))
@torch.no_grad()
def test_norms_are_named(form, size, name, tmp_path):
    """In either layout they are other nodes of ONNX, and at any size other nodes again."""
    model, norms = make(name, torch.float32, **MODELS[name]).fuse(), []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm):
            module.register_forward_hook(lambda *args: norms.append(args[0]))
    model(torch.zeros(1, 3, 96, 64))
    model = make(name, torch.float32, **MODELS[name]).fuse()
    if form != CHANNELS_LAST:  # means are products, or over an axis
        model, _ = rewrite(model, size, form)
    sides = (Range(64, 4096),) * 2 if size is None else (Range(n, n) for n in size[1:])
    shapes = Shapes.of(name, 3, Range(1, 8) if size is None else Range(2, 2), *sides)
    FORMATS["onnx"].write(model, shapes, None, {}, tmp_path / "o.onnx")
    graph = onnx.load(tmp_path / "o.onnx").graph
    quantised = {node.name for node in quantise.products(graph, 3)}
    left = quantise.left_in_float32(graph, quantised).split(", ")
    assert len(norms) > 2 and f"{len(norms)} norms" in left, left
    made = {"test_inline_deit": 2, "test_vittt": 4}.get(name, 0)  # kernels, and ViT³'s states
    assert sum(int(each.split()[0]) for each in left if "other products" in each) <= made, left


def run_kinds(path, folder):
    """Kinds of the nodes that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


def test_batches_are_full():
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 1, 6, 6)
    calibration = Calibration(images, images, "nowhere")
    assert [batch[:, 0, 0, 0].tolist() for batch in calibration.batches(3)] == [
        [0, 1, 2],
        [3, 4, 0],
    ]
    assert next(calibration.batches(8)).shape == (8, 1, 6, 6)
    for size, batches in ((7, [[0, 1, 2, 3, 4, 0, 1]]), (2, [[0, 1], [2, 3], [4, 0]])):
        checks = calibration.checks((size, 1, 9, 3))
        assert [batch[:, 0, 0, 0].tolist() for batch in checks] == batches
        assert {tuple(batch.shape) for batch in checks} == {(size, 1, 9, 3)}


@pytest.fixture
def folders(tmp_path, monkeypatch, images):
    """A working folder with others to calibrate on."""
    monkeypatch.chdir(tmp_path)
    file = next(Path(images).rglob("*.png")).read_bytes()
    for name, count in (("empty", 0), ("few", HELD_OUT), ("damaged", 20)):
        Path(name).mkdir()
        for index in range(count):
            Path(name, f"{index}.png").write_bytes(file if name == "few" else file[:60])
    return tmp_path


@pytest.mark.parametrize(
    "flags, message",
    [
        (["o.onnx", "--dtype", "int8"], "give --data-dir FOLDER, or --dataset NAME"),
        (["o.onnx", *CALIBRATE, "nowhere"], "--data-dir nowhere is not a folder"),
        (["o.onnx", *CALIBRATE, "empty"], "folder empty holds no images"),
        (["o.onnx", *CALIBRATE, "few"], "few has 8 images"),
        (["o.onnx", *CALIBRATE, "damaged"], "cannot read image damaged/"),
        (["o.onnx", "--dtype", "int8", "--dataset", "digit"], "digit"),
        (
            ["o.onnx", "--dtype", "int8", "--dataset", "digits", "--train-split", "test"],
            "--train-split test: digits has one part to train on",
        ),
        (["o.onnx", *CALIBRATE, "few", "--train-split", "train"], "is for --dataset: of a folder"),
        (["o.onnx", *CALIBRATE, "few", "--in-chans", "13"], "with 13 channels is known"),
        (["o.onnx", *CALIBRATE, "few", "--calibration-images", "0"], "must be at least 1"),
        (["o.pt2", *CALIBRATE, "few"], "--dtype int8 is for --format onnx"),
        (["o.onnx", "--data-dir", "few"], "--data-dir is for --dtype int8"),
        (["o.onnx", "--dtype", "float16", "--dataset", "digits"], "--dataset is for --dtype int8"),
    ],
)
def test_mistakes(flags, message, command, folders):
    before = sorted(folders.iterdir())
    result = command("export", MODEL, *flags)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert sorted(folders.iterdir()) == before


@pytest.mark.parametrize("complete", [True, False])
def test_every_projection(complete, tmp_path):
    """A linear layer of two that the program has not as a product, as with another exporter."""
    path = tmp_path / "o.onnx"
    kept = torch.nn.Linear(6, 5)
    model = (
        torch.nn.Sequential(kept) if complete else torch.nn.Sequential(kept, torch.nn.Linear(6, 5))
    )
    float32 = onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(kept.weight.detach().numpy().T.copy(), "weight")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["images", "weight"], ["logits"], name="product")],
        "graph",
        [onnx.helper.make_tensor_value_info("images", float32, ["batch", 1, 6, 6])],
        [onnx.helper.make_tensor_value_info("logits", float32, ["batch", 1, 6, 5])],
        [weight],
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    calibration = Calibration(torch.randn(4, 1, 6, 6), torch.randn(2, 1, 6, 6), "nowhere")
    shapes = Shapes(Range(1, 8), Range(6, 6), Range(6, 6), 1)
    if complete:
        quantise.quantise(path, model, shapes, calibration)
        x = torch.randn(2, 1, 6, 6).clamp(-1.5, 1.5)
        (y,) = onnxruntime.InferenceSession(path).run(None, {"images": x.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(y), x @ kept.weight.detach().T, atol=0.1, rtol=0
        )
    else:
        with pytest.raises(UserError, match="30 of 60 weights of products became int8"):
            quantise.quantise(path, model, shapes, calibration)
