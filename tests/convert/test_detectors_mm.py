"""Whole detectors and segmentors of mmcv 1, converted, in models of mmdet 3 and mmseg 1."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from tests.convert import mmcv1
from tests.dense.openmmlab import build, packages
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.checkpoints.read import read_checkpoint
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.errors import UserError
from vitlinear_cli import main

pytestmark = packages()

from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.hooks import EMAHook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner, load_checkpoint  # noqa: E402

from vitlinear.dense.openmmlab.runner import EvaluationRunner  # noqa: E402

DIMS = [64, 128, 256, 512]
BACKBONE = {"type": "vitlinear.Backbone", "model": "ravlt_t", "out_norms": True}
NORM = {"type": "BN", "requires_grad": True}
DETECTORS = {
    "RetinaNet": "retinanet_r50_fpn",
    "Mask R-CNN": "mask-rcnn_r50_fpn",
    "Cascade Mask R-CNN": "cascade-mask-rcnn_r50_fpn",
}
SEGMENTORS = {"Semantic FPN": "fpn_r50", "UperNet": "upernet_r50"}


def config(architecture: str) -> tuple[str, Config]:
    """The installed base config with our backbone, and the framework that it is of."""
    framework = "mmdet" if architecture in DETECTORS else "mmseg"
    name = (DETECTORS | SEGMENTORS)[architecture]
    (package,) = importlib.util.find_spec(framework).submodule_search_locations
    made = Config.fromfile(f"{package}/.mim/configs/_base_/models/{name}.py")
    model: dict[str, Any] = {"neck": {"in_channels": DIMS}}
    if architecture == "UperNet":
        model = {}
        model["decode_head"] = {"in_channels": DIMS, "num_classes": 150, "norm_cfg": NORM}
        model["auxiliary_head"] = {"in_channels": DIMS[2], "num_classes": 150, "norm_cfg": NORM}
    elif architecture == "Semantic FPN":
        model["decode_head"] = {"num_classes": 150, "norm_cfg": NORM}
    if framework == "mmseg":
        model |= {"pretrained": None, "data_preprocessor": {"size": (64, 96)}}
    elif architecture != "RetinaNet":
        model |= {"test_cfg": {"rpn": {"max_per_img": 10}}}  # boxes, of 1000: for the time it takes
    made.merge_from_dict({"model": model})
    made.model.backbone = BACKBONE
    return framework, made


@pytest.fixture(scope="module")
def ravlt() -> dict[str, torch.Tensor]:
    return mmcv1.classifier("rala", "RAVLT_T")


def filled(architecture: str, ravlt: dict[str, torch.Tensor]) -> tuple[Any, dict[str, Any]]:
    """A model with the authors' weights, by the classifier's way; and the file that they saved."""
    framework, made = config(architecture)
    model = build(made.model, framework)
    norms = mmcv1.output_norms("rala", DIMS, range(4))
    backbone = model.backbone
    translated = checkpoint_filter_fn(ravlt, backbone.model)
    backbone.model.load_state_dict({key: translated[key] for key in backbone.model.state_dict()})
    for index, norm in backbone.norms.items():
        for part in ("weight", "bias"):
            norm.get_parameter(part).data.copy_(norms[f"extra_norms.{index}.norm.{part}"])
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    return model, mmcv1.checkpoint("rala", ravlt, norms, heads)


def outputs(model: Any) -> list[torch.Tensor]:
    """The outputs of the heads for an image, before boxes are chosen or maps enlarged."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 64, 96, generator=generator)
    sample = DetDataSample(metainfo={"img_shape": (64, 96), "scale_factor": (1.0, 1.0)})
    with torch.no_grad():
        leaves = tree_leaves(model.eval()(images, [sample], mode="tensor"))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("architecture", [*DETECTORS, *SEGMENTORS])
def test_round_trip(ravlt, tmp_path, capsys, architecture):
    expected, content = filled(architecture, ravlt)
    torch.save(content, tmp_path / "theirs.pth")
    arguments = [str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth"), "--model", "ravlt_t"]
    assert main(["convert", *arguments]) == 0
    assert f"architecture  {architecture}, 2 classes" in capsys.readouterr().out

    framework, made = config(architecture)
    model = build(made.model, framework)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a file that needs code to be run, say
        load_checkpoint(model, str(tmp_path / "ours.pth"), map_location="cpu", strict=True)
    wanted = outputs(expected)
    assert len(wanted) >= 1 and all(value.isfinite().all() for value in wanted)
    for actual, value in zip(outputs(model), wanted, strict=True):
        assert torch.equal(actual, value)


def test_class_names(ravlt, tmp_path):
    """They come with the file into what mmseg's and mmdet's inference know of it."""
    from mmdet.apis import init_detector
    from mmseg.apis import init_model

    for architecture in ("Semantic FPN", "RetinaNet"):
        _, content = filled(architecture, ravlt)
        torch.save(content, tmp_path / "theirs.pth")
        target = tmp_path / f"{architecture}.pth"
        assert main(
            ["convert", str(tmp_path / "theirs.pth"), str(target), "--model", "ravlt_t"]
        ) == 0  # fmt: skip
        framework, made = config(architecture)
        made.default_scope = framework
        made.test_dataloader = {"dataset": {"type": "CocoDataset"}}
        start = init_detector if framework == "mmdet" else init_model
        model = start(made, str(target), device="cpu")
        assert model.dataset_meta["classes"] == ("person", "bicycle")
        if framework == "mmseg":
            assert model.dataset_meta["palette"] == [[220, 20, 60], [119, 11, 32]]


def test_evaluation_asks_for_the_conversion(ravlt, tmp_path):
    model, content = filled("RetinaNet", ravlt)
    torch.save(content, tmp_path / "theirs.pth")
    runner = SimpleNamespace(model=model, call_hook=lambda *args, **kwargs: None)
    with pytest.raises(UserError, match="convert it first, with `vitlinear convert`"):
        EvaluationRunner.load_checkpoint(runner, str(tmp_path / "theirs.pth"))


class Model(BaseModel):
    """As small as mmengine trains."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = MultiScaleBackbone("test_ravlt", out_norms=True)

    def forward(self, inputs: torch.Tensor, mode: str = "loss") -> dict[str, torch.Tensor]:
        return {"loss": sum(level.square().mean() for level in self.backbone(inputs))}


def test_training_checkpoint_of_mmengine(tmp_path, capfd):
    """Log histories, averaged weights, optimizer: all is read, and none of it run."""
    torch.manual_seed(0)
    images = [{"inputs": torch.randn(3, 64, 64)} for _ in range(2)]
    runner = Runner(
        Model(),
        str(tmp_path),
        train_dataloader=DataLoader(images, batch_size=1),  # type: ignore[arg-type]
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}},
        param_scheduler={"type": "MultiStepLR", "milestones": [1]},
        custom_hooks=[EMAHook(momentum=0.5)],
        experiment_name="test_training_checkpoint_of_mmengine",
    )
    runner.train()
    capfd.readouterr()
    path = Path(tmp_path, "epoch_1.pth")
    checkpoint = read_checkpoint(path)
    assert checkpoint["message_hub"]["runtime_info"]["iter"] == 1
    assert {"optimizer", "param_schedulers", "ema_state_dict"} <= checkpoint.keys()
    # mmengine saves the averaged weights in the place of the model's.
    loaded = MultiScaleBackbone("test_ravlt", checkpoint_path=path).model.state_dict()
    for key, value in loaded.items():
        assert torch.equal(value, checkpoint["state_dict"][f"backbone.model.{key}"])
    assert main(["convert", str(path), str(tmp_path / "out.pth")]) == 2
    assert "has today's keys already" in capfd.readouterr().err
