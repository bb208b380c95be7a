"""``vitlinear export``: what it writes computes what the model does, or is not there."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import resource
import signal
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from vitlinear.checkpoints.card import Card
from vitlinear.create import data_config
from vitlinear.errors import UserError, pip_install
from vitlinear.export import Shapes, write
from vitlinear.export import command as export_command
from vitlinear.export.calibration import Calibration
from vitlinear.export.shapes import Range

MODEL = "test_linear_deit"  # the quickest to trace


@pytest.fixture
def weights(command, tmp_path_factory):
    """A checkpoint of seven classes, and its model."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    result = command("export", MODEL, path, "--num-classes", 7, "--model-kwargs", "depth=1")
    assert (result.code, result.err) == (0, "")
    model = timm.create_model(MODEL, checkpoint_path=path, num_classes=7, depth=1).eval()
    return path, model


def close(logits, expected, tolerance):
    return float((logits.float() - expected).norm() / expected.norm()) <= tolerance


@pytest.mark.quick
def test_safetensors(command, tmp_path):
    path = tmp_path / "model.safetensors"
    result = command("export", "test_ravlt", path, "--num-classes", 5, "--in-chans", 1)
    assert (result.code, result.err) == (0, "")
    assert "weights       random (give --checkpoint" in result.out
    assert result.out.count("verified      ") == 3 and f"wrote         {path}" in result.out
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "test_ravlt" and json.loads(metadata["num_classes"]) == 5
    assert metadata["made_by"].startswith("vitlinear ") and len(json.loads(metadata["mean"])) == 1
    model = timm.create_model("test_ravlt", checkpoint_path=path, num_classes=5, in_chans=1)
    again = tmp_path / "again.safetensors"
    assert command("export", "test_ravlt", again, "--checkpoint", path).code == 0
    with safe_open(again, "pt") as file:
        for key, value in model.state_dict().items():
            assert torch.equal(file.get_tensor(key), value)
        assert file.metadata()["license"] == metadata["license"]
        assert file.metadata()["weights"] == path.name
    assert [file.name for file in sorted(tmp_path.iterdir())] == [again.name, path.name]


def test_torch_export(command, weights, tmp_path):
    checkpoint, model = weights
    path = tmp_path / "model.pt2"
    result = command(
        "export", MODEL, path, "--checkpoint", checkpoint, "--fuse",
        "--batch", "1:8", "--height", "48:256", "--width", "64:250",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    assert "input         1:8 x 3 x 48:256 x 64:250, float32" in result.out
    files = {write.METADATA_FILE: ""}
    program = torch.export.load(path, extra_files=files).module()
    metadata = json.loads(files[write.METADATA_FILE])
    assert metadata["model"] == MODEL and metadata["fused"] == "true"
    assert metadata["crop_mode"] == "center"
    assert len(metadata["weights_sha256"]) == 64 and json.loads(metadata["std"])
    with zipfile.ZipFile(path) as archive:  # no images that it was traced with
        assert (
            sum(f.file_size for f in archive.infolist() if "sample_inputs" in f.filename) < 10_000
        )
    for size in ((1, 3, 256, 64), (5, 3, 101, 229)):
        x = torch.randn(size)
        with torch.no_grad():
            assert close(program(x), model(x), 1e-4)
    with pytest.raises(Exception, match="256"):
        program(torch.randn(1, 3, 300, 64))


@pytest.mark.slow
def test_onnx(command, weights, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    checkpoint, model = weights
    path = tmp_path / "model.onnx"
    result = command("export", MODEL, path, "--checkpoint", checkpoint)
    assert (result.code, result.err) == (0, "")
    assert b".py" not in path.read_bytes()  # no calls of the exporter, nor folders of this machine
    session = onnxruntime.InferenceSession(path)
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, logits.name) == ("images", "logits")
    assert images.shape == ["batch", 3, "height", "width"]
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["model"] == MODEL and json.loads(metadata["num_classes"]) == 7
    assert json.loads(metadata["mean"]) == list(model.pretrained_cfg["mean"])
    for size in ((1, 3, 33, 90), (4, 3, 130, 65)):
        x = torch.randn(size)
        (out,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            assert close(torch.from_numpy(out), model(x), 1e-4)


SHALLOW = ["--model-kwargs", "depths=(1,1,1,1)"]
FROM_64 = ["--height", "64:4096", "--width", "64:4096"]  # NaLaFormer's bound, see docs/export.md
# Windows that adapt to any size take a minute to trace; MAViT has the shapes of RAVLT. At one size
# others are traced in half the time too: RAVLT is the pyramid of any size outside nightly runs.
ONE_SIZE = ["--height", 64, "--width", 96]


# In every run: a pyramid, with a stage of either kind of attention.
HALF_PRECISION = [
    ("test_ravlt", [*ONE_SIZE, "--model-kwargs", "depths=(1,0,1,0)"]),
]
HALF_PRECISION_BY_NIGHT = [
    ("test_linear_deit", []),
    ("test_ravlt", SHALLOW),
    ("test_inline_swin", ONE_SIZE),
    ("test_inline_deit", ["--model-kwargs", "depth=1"]),
    ("test_inline_pvt", SHALLOW),
    ("test_inline_cswin", ONE_SIZE),
    ("test_l2vit", SHALLOW),
    ("test_lightnet", ["--model-kwargs", "depth=1"]),
    ("test_mavit", [*ONE_SIZE, *SHALLOW]),
    ("test_mila", SHALLOW),
    ("test_nalaformer", [*SHALLOW, *FROM_64]),
    ("test_pola_pvt", SHALLOW),
    ("test_pola_swin", ONE_SIZE),
    ("test_vittt", ["--model-kwargs", "depth=1"]),
    ("test_h_vittt", SHALLOW),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags",
    [
        *HALF_PRECISION,
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in HALF_PRECISION_BY_NIGHT),
    ],
)
def test_onnx_in_half_precision(name, flags, command, tmp_path):
    """Each family, in onnxruntime against the model in float32 at three sizes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    result = command("export", name, path, "--dtype", "float16", "--fuse", *flags)
    assert (result.code, result.err) == (0, "")
    assert result.out.count("\nverified      ") == 3
    (images,) = onnxruntime.InferenceSession(path).get_inputs()
    sides = [64, 96] if 96 in flags else ["height", "width"]
    assert (images.type, images.shape) == ("tensor(float16)", ["batch", 3, *sides])


@pytest.mark.parametrize("earlier", [False, True])
def test_what_computes_something_else_is_not_kept(earlier, command, tmp_path, monkeypatch):
    """A writer that loses a bias, as an exporter's defect would."""
    kind = write.FORMATS["safetensors"]

    def lossy(model, shapes, card, metadata, path):
        with torch.no_grad():
            model.head.bias += 0.01
        kind.write(model, shapes, card, metadata, path)

    monkeypatch.setitem(write.FORMATS, "safetensors", dataclasses.replace(kind, write=lossy))
    path = tmp_path / "model.safetensors"
    if earlier:
        path.write_text("earlier")
    result = command("export", MODEL, path, "--overwrite")
    assert result.code == 2 and result.err.count("\n") == 1 and result.out == ""
    assert "was not written: at 1x3x33x33 it differs from the model by " in result.err
    assert [file.name for file in tmp_path.iterdir()] == [path.name] * earlier
    assert not earlier or path.read_text() == "earlier"


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_at_once(overwrite, command, tmp_path, monkeypatch):
    """A file that appears while another is being written is kept, but for --overwrite."""
    kind, path = write.FORMATS["safetensors"], tmp_path / "model.safetensors"
    link = tmp_path / "link.safetensors"  # which stays
    link.symlink_to(path)

    def outrun(*args):
        path.write_text("quicker")
        kind.write(*args)

    monkeypatch.setitem(write.FORMATS, "safetensors", dataclasses.replace(kind, write=outrun))
    result = command("export", MODEL, link, *["--overwrite"] * overwrite)
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [link, path]
    if overwrite:
        assert result.code == 0 and path.read_bytes() != b"quicker"
    else:
        assert result.code == 2 and path.read_text() == "quicker"
        assert "exists: give another name, or --overwrite" in result.err


def test_folder_that_cannot_be_written_to(command, tmp_path, monkeypatch):
    """Nothing is traced first. Modes of folders do not bind root, who runs the tests somewhere."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    path = tmp_path / "model.safetensors"
    result = command("export", MODEL, path)
    assert result.code == 2
    assert result.err == f"error: cannot write {path}: Read-only file system\n"


@pytest.mark.parametrize("kind", write.FORMATS)
def test_full_disk(kind, tmp_path):
    """The file size limit of the process fails a write as a full disk does."""
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    model = timm.create_model(MODEL, depth=1, num_classes=5).eval()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*: File too large$"):
            suffix = write.FORMATS[kind].suffix
            export_small(tmp_path / f"o{suffix}", kind, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["safetensors", "pt2"])
def test_channels_that_no_image_has(suffix, command, tmp_path):
    """Thirteen bands of a satellite: the file does not say that they are colours."""
    path = tmp_path / f"model.{suffix}"
    flags = ["--in-chans", 13, "--model-kwargs", "depth=1"]
    if suffix == "pt2":  # one size is the quickest to trace
        flags += ["--batch", 2, "--height", 64, "--width", 80]
    result = command("export", MODEL, path, *flags)
    assert (result.code, result.err) == (0, "")
    if suffix == "safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
    else:
        files = {write.METADATA_FILE: ""}
        program = torch.export.load(path, extra_files=files).module()
        assert program(torch.zeros(2, 13, 64, 80)).shape == (2, 1000)
        metadata = json.loads(files[write.METADATA_FILE])
    assert "image_mode" not in metadata
    assert json.loads(metadata["input_size"])[0] == len(json.loads(metadata["mean"])) == 13


def test_terminated(command, tmp_path, monkeypatch):
    """SIGTERM while a file is being written leaves nothing of it, and later means what it did."""
    kind = write.FORMATS["safetensors"]

    def interrupted(model, shapes, card, metadata, path):
        path.write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(write.FORMATS, "safetensors", dataclasses.replace(kind, write=interrupted))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        command("export", MODEL, tmp_path / "model.safetensors")
    assert ended.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) == before


def test_sizes_checked():
    wide = Shapes.of("l2vit_base_384").checked(384, 384)
    assert wide == [(1, 3, 33, 33), (2, 3, 288, 288), (3, 3, 271, 147)]
    one = Shapes.of("ravlt_t", 3, Range(1, 1), Range(224, 224), Range(224, 224))
    assert one.checked(224, 224) == [(1, 3, 224, 224)]


def test_sides_traced():
    """Up to 31 pixels smaller ones too, where the model takes them."""

    def sides(model, low, high=4096):
        shapes = Shapes.of(model, height=Range(low, high), width=Range(low + 1, high))
        assert shapes.height.low == low
        return [(dim.min, dim.max) for axis, dim in shapes.dynamic.items() if axis > 0]

    assert sides("ravlt_t", 33) == [(33, 4096), (33, 4096)]
    assert sides("lightnet_tiny", 64, 96) == [(33, 96), (65, 96)]
    assert sides("inline_pvt_tiny", 64) == [(64, 4096), (65, 4096)]
    assert Shapes.of("ravlt_t", 3, None, Range(224, 224), Range(96, 96)).dynamic.keys() == {0}


def test_other_sides_than_by_default():
    """LightNet's maps have none of the bounds of a pyramid that torch.export could reason from."""
    model = timm.create_model("test_lightnet", depth=1).eval()
    shapes = Shapes.of("test_lightnet", 3, None, Range(64, 96), Range(64, 96))
    example = shapes.example()
    assert example.shape[2] != example.shape[3]
    program = write._trace(model, shapes, example).module()
    for size in ((1, 3, 64, 96), (3, 3, 95, 71)):
        x = torch.randn(size)
        with torch.no_grad():
            assert close(program(x), model(x), 1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["ravlt_q", "o.onnx"], "model 'ravlt_q' is unknown (did you mean ravlt_"),
        (["resnet50", "o.onnx"], "is a model of timm, not of this package"),
        ([MODEL, "nowhere/o.onnx"], "its folder does not exist"),
        ([MODEL, "o.bin"], "cannot tell the format of"),
        ([MODEL, "o.bin", "--format", "onnx"], "has to end with .onnx"),
        ([MODEL, "o.onnx", "--format", "onx"], "invalid choice: 'onx'"),
        ([MODEL, "o.onnx", "--height", "16:64"], "--height 16:64 is too small: "),
        ([MODEL, "o.onnx", "--width", 64], "--width 64: give two numbers, or two ranges"),
        ([MODEL, "o.pt2", "--batch", "8:2"], "'8:2' is neither a number nor LEAST:MOST"),
        ([MODEL, "o.pt2", "--dtype", "float16"], "--dtype float16 is for --format onnx"),
        *(
            ([MODEL, "o.onnx", "--dtype", dtype, "--runtime", "openvino"], "--dtype float32 and")
            for dtype in ("float16", "int8")
        ),
        ([MODEL, "o.safetensors", "--fuse"], "--fuse is for onnx and torch-export"),
        ([MODEL, "o.pt2", "--checkpoint", "no.pth"], "no.pth does not exist"),
        ([MODEL, "o.onnx", "--model-kwargs", "features_only=True"], "makes a model without logits"),
        (
            [MODEL, "o.pt2", "--batch", 4096, "--height", 500_000, "--width", 500_000],
            "too little memory to compare with the model at 4096x3x500000x500000: give smaller",
        ),
        ([MODEL, "o.onnx", "--checkpoint", "there.pt2"], "is a program of torch.export, not a"),
        (["test_ravlt", "o.onnx", "--model-kwargs", "depths=3"], "depths must have four entries"),
        ([MODEL, "there.pt2"], "exists: give another name, or --overwrite"),
        (
            [MODEL, "there.pt2", "--checkpoint", "there.pt2", "--overwrite"],
            "cannot write there.pt2: the command reads it",
        ),
    ],
)
def test_mistakes(flags, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.pt2").write_text("earlier")
    result = command("export", *flags)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["there.pt2"]


def test_the_size_that_a_checkpoint_has(command, tmp_path):
    """Positions of another size would be other numbers: a file's own size, or none."""
    weights, target = tmp_path / "w.safetensors", tmp_path / "o.onnx"
    assert command("export", "test_inline_deit", weights, "--img-size", 64).code == 0
    result = command(
        "export", "test_inline_deit", target, "--checkpoint", weights, "--img-size", 96
    )
    assert result.code == 2 and not target.exists()
    assert "is of a model for images of 64x64, not of --img-size 96: leave it out" in result.err


def test_published_weights_with_another_classifier(monkeypatch):
    model = timm.create_model(MODEL, num_classes=5)
    model.pretrained_cfg |= {"architecture": MODEL, "tag": "in1k", "num_classes": 1000}
    source = SimpleNamespace(checkpoint=None, pretrained=True)
    assert export_command._origin(source, model)["weights"] == (
        f"{MODEL}.in1k, with a random classifier of 5 classes"
    )
    model.pretrained_cfg["num_classes"] = 5
    assert export_command._origin(source, model)["weights"] == f"{MODEL}.in1k"


def export_small(path, kind="onnx", model=None, **kwargs):
    """From Python, of images of 64 x 64."""
    model = model or timm.create_model(MODEL, num_classes=5, depth=1).eval()
    shapes = Shapes.of(MODEL, 3, Range(1, 1), Range(64, 64), Range(64, 64))
    card = Card(MODEL, {"depth": 1}, 5, 3, data_config(model, {}), "RGB")
    return write.export(model, path, kind, shapes, card, {}, **kwargs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"runtime": "OpenVINO"}, "unknown runtime 'OpenVINO'"),
        ({"runtime": None}, "unknown runtime None: use one of onnxruntime, openvino"),
        ({"layout": "channel-first"}, r"'channel-first' \(did you mean channels-first"),
        ({"kind": "onx"}, r"unknown format 'onx' \(did you mean onnx\?\): use one of onnx, torch-"),
        ({"dtype": "float16"}, "unknown dtype"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"dtype": torch.bfloat16}, "unknown dtype 'torch.bfloat16'.*: use one of float32, float1"),
        ({"kind": "torch-export", "dtype": torch.float16}, "float16 is for --format onnx"),
        ({"kind": "torch-export", "layout": "channels-first"}, "is for --format onnx"),
        ({"dtype": torch.float16, "layout": "channels-first"}, "has no form in float16"),
        ({"dtype": torch.int8}, "torch.int8 needs it"),
    ],
)
def test_arguments_that_there_are_not(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export_small(tmp_path / "o.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dtype, layout, runtime, said",
    [
        (torch.float32, "auto", "onnxruntime", ("channels-first", "onnxruntime")),
        (torch.float32, "auto", "openvino", ("channels-last", "openvino")),
        (torch.float32, "channels-first", "openvino", ("channels-first", "openvino")),
        (torch.float32, "channels-last", "openvino", ("channels-last", None)),
        (torch.float16, "auto", "openvino", ("channels-last", None)),
        (torch.int8, "auto", "openvino", ("channels-first", None)),
    ],
)
def test_the_file_names_the_runtime_that_chose(dtype, layout, runtime, said, tmp_path, monkeypatch):
    noted = {}

    def note(model, shapes, card, metadata, path):
        noted.update(metadata)
        raise UserError("noted")

    kind = dataclasses.replace(write.FORMATS["onnx"], write=note)
    monkeypatch.setitem(write.FORMATS, "onnx", kind)
    x = torch.zeros(2, 3, 64, 64)
    images = Calibration(x, x, "nowhere") if dtype == torch.int8 else None
    with pytest.raises(UserError, match="noted"):
        export_small(
            tmp_path / "o.onnx", dtype=dtype, calibration=images, layout=layout, runtime=runtime
        )
    assert (noted["layout"], noted.get("runtime")) == said


def test_what_onnx_has_no_form_for(tmp_path):
    """An operator that torch.onnx does not know: one line, and no file."""
    model = timm.create_model(MODEL, num_classes=5, depth=1).eval()
    model.head = nn.Sequential(model.head, Unknown())
    with pytest.raises(UserError, match=r"torch.onnx makes no ONNX of this model"):
        export_small(tmp_path / "o.onnx", model=model, layout="channels-last")
    assert list(tmp_path.iterdir()) == []


class Unknown(nn.Module):
    """A step of which ONNX has none."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_missing_packages(command, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else found(name, *a)
    )
    result = command("export", MODEL, tmp_path / "o.onnx")
    assert result.code == 2
    assert result.err == f"error: --format onnx needs onnx: {pip_install('export')}\n"


def test_program_that_needs_this_package(command, tmp_path):
    kwargs = ["--model-kwargs", "attn_backend=library", "depth=1"]
    result = command("export", MODEL, tmp_path / "o.pt2", *kwargs)
    assert result.code == 2 and "the program would need vitlinear to run" in result.err
    assert list(tmp_path.iterdir()) == []
