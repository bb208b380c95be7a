"""torch's own exporters to ONNX, called without our command: right at other sizes, or an error."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.pairwise import some_by_night
from vitlinear.layers.positions.learned import resized_by_products

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SHALLOW = {"depths": (1, 1, 1, 1)}
# Several windows of each kind, whole ones and padded ones, shifted and not, in few blocks.
KINDS = {
    "test_inline_cswin": {},
    "test_inline_deit": {"depth": 1},
    "test_inline_pvt": SHALLOW,
    "test_inline_swin": {
        "depths": (1, 2, 1, 1),
        "num_inline": (1, 0, 0, 0),
        "inline_window_size": 6,
        "window_size": 3,
    },
    "test_l2vit": {"depths": (1, 2, 1, 1)},
    "test_lightnet": {"depth": 1},
    "test_linear_deit": {"depth": 1},
    "test_mavit": SHALLOW,
    "test_mila": SHALLOW,
    "test_nalaformer": SHALLOW,
    "test_pola_pvt": SHALLOW,
    "test_pola_swin": {"depths": (2, 1, 2, 1), "pola_window_size": 6, "window_size": 3},
    "test_ravlt": SHALLOW,
    "test_vittt": {"depth": 1},
    "test_h_vittt": SHALLOW,
}
SIZES = [(1, 3, 64, 64), (2, 3, 64, 144), (3, 3, 97, 65), (1, 3, 33, 160)]


def make(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **KINDS[name]).eval()


@torch.no_grad()
def check(model, path, sizes):
    session = onnxruntime.InferenceSession(path)
    (images,) = session.get_inputs()
    for size in sizes:
        x = torch.randn(size)
        logits = torch.from_numpy(session.run(None, {images.name: x.numpy()})[0])
        expected = model(x)
        assert logits.shape == expected.shape
        assert (logits - expected).norm() <= 1e-4 * expected.norm(), size


# One in every run, the fastest: what ties a program to a batch is alike.
EVERY_RUN = ("test_lightnet",)


@pytest.mark.slow
@some_by_night("name", KINDS, EVERY_RUN)
def test_one_image_stands_for_a_batch(name, tmp_path):
    pytest.importorskip("onnxscript")
    model = make(name)
    program = torch.onnx.export(
        model,
        (torch.randn(1, 3, 64, 64),),
        dynamo=True,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    for value in (program.model.graph.inputs[0], program.model.graph.outputs[0]):
        assert str(value.shape[0]) == "batch"
    program.save(tmp_path / "model.onnx")
    check(model, tmp_path / "model.onnx", [(batch, 3, 64, 64) for batch in (1, 2, 3)])


def export_traced(model, path, side=96):
    torch.onnx.export(
        model,
        (torch.randn(1, 3, side, side),),
        path,
        dynamo=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}, "logits": {0: "batch"}},
        opset_version=17,
    )


# One of each skeleton.
TRACED = ("test_inline_deit", "test_inline_swin", "test_pola_pvt", "test_l2vit", "test_ravlt")
TRACED += ("test_h_vittt",)


@pytest.mark.filterwarnings("ignore")
@some_by_night("name", [name for name in KINDS if name != "test_lightnet"], TRACED)
def test_traced_at_one_size_right_at_others(name, tmp_path):
    """Traced at 96 pixels, which is the size of the positions of the models of one resolution."""
    model = make(name)
    export_traced(model, tmp_path / "model.onnx")
    check(model, tmp_path / "model.onnx", SIZES)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_traced_is_refused(tmp_path):
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="rms_norm"):
        export_traced(make("test_lightnet"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(6, 6), (4, 9), (13, 40), (14, 2), (1, 3)])
def test_positions_resized_by_products(size):
    x = torch.randn(14, 5, 3, dtype=torch.float64)
    wanted = F.interpolate(x.permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)
    torch.testing.assert_close(resized_by_products(x, *size), wanted[0].permute(1, 2, 0))
