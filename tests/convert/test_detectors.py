"""Detectors and segmentors of mmcv 1 through ``vitlinear convert``; needs none of mm* itself.

The whole models are in test_detectors_mm.py.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import timm
import torch

import vitlinear  # noqa: F401  registers the models
from tests.convert import mmcv1
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.checkpoints.read import read_checkpoint
from vitlinear.convert import recognise
from vitlinear.convert.detectors import architecture_of
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.errors import UserError
from vitlinear.facts import PUBLISHED
from vitlinear.train.start_weights import initial_weights
from vitlinear_cli import main

ON_META = functools.cache(MultiScaleBackbone)
DIMS = {
    **dict.fromkeys(("rala", "mala", "mlla"), (64, 128, 256, 512)),
    "l2vit": (96, 192, 384, 768),
}
HEADS = {
    "RetinaNet": "neck.lateral_convs.0.conv.weight bbox_head.retina_cls.weight",
    "Mask R-CNN": "neck.a rpn_head.rpn_conv.weight roi_head.bbox_head.fc_cls.bias "
    "roi_head.mask_head.conv_logits.weight",
    "Cascade Mask R-CNN": "neck.a rpn_head.b roi_head.bbox_head.0.fc_cls.bias "
    "roi_head.mask_head.0.conv_logits.weight",
    "Semantic FPN": "neck.a decode_head.conv_seg.weight decode_head.scale_heads.0.0.conv.weight",
    "UperNet": "decode_head.conv_seg.weight decode_head.fpn_bottleneck.conv.weight "
    "auxiliary_head.conv_seg.weight",
    "not a published one": "neck.a bbox_head.atss_cls.weight",
}


def heads(architecture: str) -> dict[str, torch.Tensor]:
    keys = HEADS[architecture].split()
    return {key: torch.full((2, 2), float(number)) for number, key in enumerate(keys)}


def run(capsys, *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["convert", *map(str, args)])
    return code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def backbones_built_once(monkeypatch):
    """Each test looks through many of the same ones."""
    monkeypatch.setattr(recognise, "MultiScaleBackbone", ON_META)


@pytest.fixture(scope="module")
def ravlt() -> dict[str, torch.Tensor]:
    return mmcv1.classifier("rala", "RAVLT_T")


def make(ravlt, architecture: str = "RetinaNet", **kwargs) -> dict:
    norms = mmcv1.output_norms("rala", DIMS["rala"], range(4))
    return mmcv1.checkpoint("rala", ravlt, norms, heads(architecture), **kwargs)


@pytest.fixture(scope="module")
def detector(ravlt, tmp_path_factory) -> Path:
    """As the authors published it."""
    path = tmp_path_factory.mktemp("published") / "retinanet_t_1x_12_epoch.pth"
    classes = [f"class {number}" for number in range(80)]
    torch.save(make(ravlt, classes=classes), path)
    return path


@pytest.fixture(scope="module")
def converted(detector) -> Path:
    target = detector.with_name("converted.pth")
    assert main(["convert", str(detector), str(target)]) == 0
    return target


@pytest.mark.parametrize(
    "family, released, name, indices, args",
    [
        ("rala", "RAVLT_T", "ravlt_t", (0, 1, 2, 3), ["--model", "ravlt_t"]),
        ("l2vit", "L2ViT_Tiny", "l2vit_tiny", (1, 2, 3), []),
        # with rotary tables, which are left out
        pytest.param("mlla", "mlla_t", "mila_tiny", (0, 1, 2, 3), [], marks=pytest.mark.nightly),
    ],
)
def test_features(tmp_path, capsys, family, released, name, indices, args):
    """Those of a backbone that was filled by the classifier's way, and the norms one by one."""
    theirs = mmcv1.classifier(family, released)
    norms = mmcv1.output_norms(family, DIMS[family], indices)
    expected = MultiScaleBackbone(name, indices, out_norms=True)
    own = expected.model.state_dict()
    translated = checkpoint_filter_fn(theirs, timm.create_model(name, device="meta"))
    expected.model.load_state_dict({key: translated[key] for key in own})
    for index, norm in expected.norms.items():
        for part in ("weight", "bias"):
            key = f"{mmcv1.OUTPUT_NORM[family].format(index)}.{part}"
            norm.get_parameter(part).data.copy_(norms[key])

    torch.save(mmcv1.checkpoint(family, theirs, norms, heads("RetinaNet")), tmp_path / "mine.pth")
    code, out, err = run(capsys, tmp_path / "mine.pth", tmp_path / "out.pth", *args)
    assert (code, err) == (0, "")
    assert f"model='{name}', out_norms=True, out_indices=({str(indices)[1:-1]})" in out
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert content["meta"]["dataset_meta"] == {
        "classes": ("person", "bicycle"),
        "palette": [[220, 20, 60], [119, 11, 32]],
    }
    state = content["state_dict"]
    assert all(torch.equal(state.pop(key), value) for key, value in heads("RetinaNet").items())
    backbone = MultiScaleBackbone(name, indices, out_norms=True)
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items()})
    images = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for actual, wanted in zip(backbone.eval()(images), expected.eval()(images), strict=True):
            assert torch.equal(actual, wanted)


def test_published_file(detector, converted, tmp_path, capsys):
    """RAVLT and MAViT have the same stages: the name of a published file says which it is."""
    code, out, _ = run(capsys, detector, tmp_path / "out.pth")
    assert code == 0 and "0 missing keys, 0 unexpected" in out
    assert "architecture  RetinaNet, 80 classes; neck, bbox_head kept as they are" in out
    assert "under state_dict; left out: meta, optimizer" in out
    assert "licence       mit" in out and "matched by file name only" in out
    meta = torch.load(converted, weights_only=True)["meta"]
    assert meta["model"] == "ravlt_t" and meta["source_file"] == detector.name
    assert meta["published_at"].endswith("aldjalkdf/RAVLT/resolve/main/" + detector.name)
    assert meta["license"] == "mit"


def test_something_else_under_a_published_name(ravlt, tmp_path, capsys):
    """Other classes or another architecture: somebody's own, whose licence is not known."""
    path = tmp_path / "retinanet_t_1x_12_epoch.pth"
    coco = [str(number) for number in range(80)]
    for content in (make(ravlt), make(ravlt, "Mask R-CNN", classes=coco)):
        torch.save(content, path)
        code, out, _ = run(capsys, path, tmp_path / "out.pth", "--overwrite")
        assert code == 0 and "licence       not known" in out
        assert "license" not in torch.load(tmp_path / "out.pth", weights_only=True)["meta"]


def test_every_published_file_names_an_architecture():
    dense = [row for row in PUBLISHED if row.task != "classification"]
    tasks = {row.task.partition(": ")[2] for row in dense}
    assert len(dense) >= 23 and len(tasks) == 6
    assert all(any(task.startswith(name) for name in HEADS) for task in tasks)
    assert {row.tag for row in dense} == {"coco", "ade20k"}


@pytest.mark.parametrize("architecture", HEADS)
def test_architecture(architecture):
    assert (architecture_of(heads(architecture)) or "not a published one") == architecture


@pytest.mark.parametrize(
    "type_, model, architecture",
    [("GLTA", "ravlt_t", "UperNet"), ("MALA", "mavit_t", "not a published one")],
)
def test_recognised(ravlt, tmp_path, capsys, type_, model, architecture):
    """The authors' config, which their files hold as text, tells RAVLT and MAViT apart."""
    torch.save(make(ravlt, architecture, backbone=type_), tmp_path / "mine.pth")
    code, out, _ = run(capsys, tmp_path / "mine.pth", tmp_path / "out.pth")
    assert code == 0 and f"model='{model}'" in out
    assert f"architecture  {architecture}, 2 classes; " in out


def test_ambiguous(ravlt, tmp_path, capsys):
    torch.save(make(ravlt), tmp_path / "mine.pth")
    code, _, err = run(capsys, tmp_path / "mine.pth", tmp_path / "out.pth")
    assert code == 2 and "several models: give --model, one of mavit_t, ravlt_t" in err


def test_without_norms_or_meta(ravlt, tmp_path, capsys):
    """A bare state dict, of somebody who put no norms behind the stages."""
    content = mmcv1.checkpoint("rala", ravlt, {}, heads("RetinaNet"))["state_dict"]
    torch.save(content, tmp_path / "mine.pth")
    code, out, _ = run(capsys, tmp_path / "mine.pth", tmp_path / "out.pth", "--model", "ravlt_t")
    assert code == 0 and "model='ravlt_t'\n" in out and "weights       bare" in out
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert "dataset_meta" not in content["meta"]
    assert not any("norms." in key for key in content["state_dict"])


def test_fine_tuning(detector, converted, tmp_path, ravlt):
    """The stages of a detector, as it was and converted, in a classifier and its other uses."""
    for path in (detector, converted):
        model = timm.create_model("ravlt_t", num_classes=5)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert initial_weights(model, path, "ravlt_t")
        for key, value in model.state_dict().items():
            after_stages = key.startswith(("final.", "head."))
            varied = value.ndim > 1
            assert not varied or torch.equal(value, before[key]) == after_stages, key
        stem = ravlt["patch_embed.proj.0.weight"]
        overlay = {"file": str(path)}
        for filled in (
            model,
            timm.create_model(
                "ravlt_t", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True
            ),
            MultiScaleBackbone("ravlt_t", checkpoint_path=path).model,
        ):
            assert torch.equal(filled.get_parameter("stem.conv1.conv.weight"), stem)
    incomplete = torch.load(converted, weights_only=True)["state_dict"]
    del incomplete["backbone.model.stages.2.blocks.0.norm1.bias"]
    torch.save(incomplete, tmp_path / "in.pth")
    with pytest.raises(UserError, match=r"no stages\.2\.blocks\.0\.norm1\.bias"):
        initial_weights(timm.create_model("ravlt_t"), tmp_path / "in.pth", "ravlt_t")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ema_backbone_norm": 1, "teacher.b": 1}, "2 keys of no part .*: ema_backbone_norm, te"),
        ({"backbone.layers.0.blocks.0.extra": 1}, "1 unexpected.* such as model.stages.0.blocks"),
        pytest.param(
            {"backbone.extra_norms.7.norm.bias": 1},
            "1 unexpected.* such as norms.7.bias",
            marks=(pytest.mark.slow, pytest.mark.nightly),
        ),
        ({"backbone.extra_norms.1.norm.bias": None}, "1 missing keys.* such as norms.1.bias"),
        ({"backbone.layers.3.blocks.1.pos.bias": None}, "1 missing.* model.stages.3.blocks.1.pos"),
        ({"backbone.extra_norms.1.norm.bias": 3}, "1 of another shape, such as norms.1.bias"),
    ],
)
def test_keys_that_are_wrong(ravlt, tmp_path, capsys, change, message):
    content = make(ravlt)
    for key, size in change.items():
        content["state_dict"].pop(key, None)
        if size is not None:
            content["state_dict"][key] = torch.ones(size)
    torch.save(content, tmp_path / "in.pth")
    # One of them without a name too, which takes a while: all models are tried.
    for more in ([], ["--model", "ravlt_t"]) if "7." in message else (["--model", "ravlt_t"],):
        code, _, err = run(capsys, tmp_path / "in.pth", tmp_path / "out.pth", *more)
        assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert [file.name for file in tmp_path.iterdir()] == ["in.pth"]


def test_files_that_are_wrong(detector, converted, ravlt, tmp_path, capsys):
    torch.save({"model": ravlt}, tmp_path / "classifier.pth")
    (tmp_path / "half.pth").write_bytes(detector.read_bytes()[:1000000])
    resnet = {"backbone.layer1.0.weight": torch.ones(2), "head.fc.weight": torch.ones(2)}
    torch.save({"state_dict": resnet}, tmp_path / "mmpretrain.pth")
    for source, target, message in (
        (tmp_path / "classifier.pth", "out.pth", "classifier's weights, so .* .safetensors"),
        (detector, "out.safetensors", "detector's weights, so the name has to end with .pth"),
        (tmp_path / "half.pth", "out.pth", "truncated, corrupt"),
        (tmp_path / "mmpretrain.pth", "out.pth", "1 keys of no part .*: head.fc.weight"),
        (converted, "out.pth", "has today's keys already: load_from= takes it"),
    ):
        code, _, err = run(capsys, source, tmp_path / target)
        assert code == 2 and err.count("\n") == 1
        assert re.search(message, err), err
        assert not (tmp_path / target).exists()


def test_only_what_is_plain_is_kept(ravlt, tmp_path, capsys):
    """Class names go on; objects, which a reader might have to run code for, do not."""
    content = make(ravlt, PALETTE=torch.ones(3).numpy())
    torch.save(content, tmp_path / "in.pth")
    assert run(capsys, tmp_path / "in.pth", tmp_path / "out.pth", "--model", "ravlt_t")[0] == 0
    meta = read_checkpoint(tmp_path / "out.pth")["meta"]
    assert meta["dataset_meta"] == {"classes": ("person", "bicycle")}
