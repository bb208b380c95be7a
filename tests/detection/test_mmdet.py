"""A RetinaNet of mmdet on a backbone of ours: losses, predictions, and the commands."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.dense.openmmlab import build, detector, packages
from vitlinear.dense import coco
from vitlinear_cli import main

pytestmark = packages()
pytest.importorskip("skimage")

ROOT = Path(__file__).parents[2]
Sizes = list[tuple[tuple[int, int], ...] | None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "coco"
    coco.write_sample(path)
    return path


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detector(tmp_path_factory.mktemp("config") / "retinanet.py", data)


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of two updates."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train-detector", str(config), "--work-dir", str(folder)]) == 0
    return folder / "epoch_1.pth"


def sizes_seen(model: Any) -> Sizes:
    """A list that grows by what the backbone is told of each batch."""
    seen: Sizes = []

    def look(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(getattr(args[0], "valid_sizes", None))

    model.backbone.register_forward_pre_hook(look)
    return seen


def inputs(shapes: list[list[int]]) -> dict[str, Any]:
    """Images of these shapes, unpadded, with samples as a pipeline packs them."""
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(len(shapes), shapes, num_classes=6)


def test_losses_and_predictions_know_the_valid_sizes(config: Path) -> None:
    from mmengine.config import Config

    shapes = [[3, 96, 128], [3, 64, 80]]
    valid = ((96, 128), (64, 80))
    model = build(Config.fromfile(config).model, "mmdet").train()
    seen = sizes_seen(model)
    losses = model(**model.data_preprocessor(inputs(shapes), training=True), mode="loss")
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert loss.isfinite() and loss > 0
    # mmdet's RetinaNet starts its pyramid at the second map
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {"backbone.norms.0.weight", "backbone.norms.0.bias"}

    model.eval()
    assert len(model.test_step(inputs(shapes))) == 2
    images = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
    with torch.no_grad():
        model(**model.data_preprocessor({"inputs": images}))
    assert seen == [valid] * 3


def test_test_time_augmentation_knows_them_too(config: Path) -> None:
    from mmengine.config import Config, ConfigDict

    tta = {"nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100}
    augmented = {
        "type": "DetTTAModel",
        "tta_cfg": ConfigDict(tta),
        "module": Config.fromfile(config).model,
    }
    model = build(augmented, "mmdet").eval()
    seen = sizes_seen(model.module)
    batches = [inputs([[3, height, 96], [3, 64, 80]]) for height in (96, 64)]
    for batch in batches:
        for sample in batch["data_samples"]:
            sample.set_metainfo({"flip": False, "flip_direction": None})
    merged = {key: [batch[key] for batch in batches] for key in ("inputs", "data_samples")}
    assert len(model.test_step(merged)) == 2
    assert seen == [((96, 96), (64, 80)), ((64, 96), (64, 80))]


def test_training_leaves_what_it_should(trained: Path) -> None:
    assert trained.exists()
    (scalars,) = trained.parent.glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert rows[0]["loss"] > 0


def test_resume_goes_on(config: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--cfg-options", "train_cfg.max_epochs=2", "default_hooks.logger.interval=1"]
    flags += ["--resume", str(trained), "--work-dir", str(tmp_path)]
    assert main(["train-detector", str(config), *flags]) == 0
    log = capsys.readouterr()
    log = log.out + log.err
    assert "Epoch(train) [2][1/2]" in log and "Epoch(train) [1]" not in log
    assert (tmp_path / "epoch_2.pth").exists() and not (tmp_path / "epoch_1.pth").exists()
    # Curves are in the folder of this run, though another one was in this process before.
    assert list(tmp_path.glob("*/vis_data/scalars.json"))


def test_no_amp_takes_a_config_back_to_float32(config: Path, tmp_path: Path) -> None:
    mixed = ["optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.loss_scale=512.0"]
    flags = ["--no-amp", "--work-dir", str(tmp_path), "--cfg-options", *mixed]
    assert main(["train-detector", str(config), *flags]) == 0
    checkpoint = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    assert "loss_scaler" not in checkpoint["optimizer"]
    assert "loss_scale" not in (tmp_path / config.name).read_text()


@pytest.mark.parametrize("tta", [[], ["--tta"]])
def test_evaluation(config: Path, trained: Path, tmp_path: Path, tta: list[str]) -> None:
    flags = ["--work-dir", tmp_path / "work", "--out", tmp_path / "out.pkl", *tta]
    flags += ["--show-dir", tmp_path / "drawn", "--cfg-options", "model.test_cfg.score_thr=0.0"]
    # what training started from is not needed any more
    flags += ["model.backbone.init_cfg.type=Pretrained", "model.backbone.init_cfg.checkpoint=gone"]
    assert main(["test-detector", str(config), str(trained), *map(str, flags)]) == 0
    predictions = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert [len(p["pred_instances"]["scores"]) > 0 for p in predictions] == [True, True]
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_classes_are_numbered_as_in_training(
    config: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the names that the checkpoint holds; other names are told."""
    content = torch.load(trained, weights_only=False)
    names = list(content["meta"]["dataset_meta"]["classes"])
    for classes, says in (
        ([*names[1:], names[0]], "'cat' is 0, in the data 1"),
        ([*names[:-1], "missile"], "'missile' where the data has 'rocket'"),
    ):
        content["meta"]["dataset_meta"]["classes"] = classes
        torch.save(content, tmp_path / "other.pth")
        work = ["--work-dir", str(tmp_path / classes[-1])]
        code = main(["test-detector", str(config), str(tmp_path / "other.pth"), *work])
        output = capsys.readouterr()
        assert code == (0 if "missile" in classes else 2)
        assert says in (output.out if "missile" in classes else output.err.splitlines()[-1])


def test_drawings_take_no_other_files_place(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images of one name have two drawings; a folder of images gets none."""
    shutil.copytree(data, tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        folder = tmp_path / "coco/images" / str(image["id"])
        folder.mkdir()
        (folder.parent / image["file_name"]).rename(folder / "x.jpg")
        image["file_name"] = f"{image['id']}/x.jpg"
    path.write_text(json.dumps(content))
    config = detector(tmp_path / "config.py", tmp_path / "coco")
    flags = [str(config), str(trained), "--work-dir", str(tmp_path / "work"), "--show-dir"]
    assert main(["test-detector", *flags, str(tmp_path / "drawn")]) == 0
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [file.name for file in drawn] == ["x-2.png", "x.png"]
    # the truth on the left, what was found on the right
    sizes = sorted((2 * image["width"], image["height"]) for image in content["images"])
    assert sorted(Image.open(file).size for file in drawn) == sizes
    flags[3] = str(tmp_path / "other")
    photograph = tmp_path / "coco/images" / content["images"][0]["file_name"]
    before = photograph.read_bytes()
    assert main(["test-detector", *flags, str(photograph.parent)]) == 2
    assert "the next run would take results for images" in capsys.readouterr().err
    assert photograph.read_bytes() == before and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_mistakes(
    config: Path, trained: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("_base_ = 'none.py'\n")
    empty = tmp_path / "empty.py"
    empty.write_text("model = dict()\n")
    junk = tmp_path / "junk.pth"
    junk.write_text("junk")
    there = tmp_path / "there.pkl"
    there.touch()
    work = ["--work-dir", tmp_path / "work"]
    option = "--cfg-options"
    annotations = "val_evaluator.ann_file"
    root, init = "train_dataloader.dataset.data_root", "model.backbone.init_cfg"
    for argv, says in (
        (["train-detector", "none.py"], "config none.py does not exist"),
        (["train-detector", broken], "none.py"),
        (["train-detector", empty], "has no train_dataloader"),
        (["train-detector", config, option, "x"], "expected KEY=VALUE, got 'x'"),
        (["train-detector", config, option, "model.backbone.model=ravlt_x"], "unknown model"),
        (["train-detector", config, option, "model.backbone.model=None"], "set model.backbone."),
        (["train-detector", config, option, f"{init}.type=Pretrained"], f"set {init}.checkpoint"),
        (["train-detector", config, option, f"{init}.type=Pretrained",
          f"{init}.checkpoint=torchvision://resnet50"], "an address of http or https"),
        (["test-detector", config, trained, "--tta", option, "test_evaluator.metric=segm"],
         "--tta: it is for boxes alone"),
        (["test-detector", config, trained, "--tta", option,
          "model.roi_head.mask_head.type=FCNMaskHead"], "boxes alone"),
        (["train-detector", config, option, f"{root}=/none"], f"/none does not exist: set {root}"),
        (["train-detector", config, option, f"{annotations}=a.json"], f"set {annotations}"),
        (["train-detector", config, "--resume", "none.pth"], "none.pth does not exist"),
        (["train-detector", config, "--launcher", "pytorch"], "was not started by it"),
        (["train-detector", config, option, "model.backbone.type=None1"], "something unknown"),
        (["train-detector", config, "--epochs", "3"], "unknown option --epochs"),
        (["test-detector", config, "none.pth"], "none.pth does not exist"),
        (["test-detector", config, trained, "--out", "x.json"], "has to end with .pkl"),
        (["test-detector", config, trained, "--out", there], "there.pkl exists: give another name"),
        (["test-detector", config, trained, "--out=~/none/x.pkl"], "its folder does not exist"),
    ):  # fmt: skip
        assert main([str(word) for word in (*argv, *work)]) == 2, argv
        error = capsys.readouterr().err
        assert says in error and error.startswith("error: ") and error.count("\n") == 1, error
        assert not (tmp_path / "work").exists(), argv
    if not torch.cuda.is_available():
        assert main(["train-detector", str(config), "--amp"]) == 2
        assert "--amp: mmengine's mixed precision needs a GPU" in capsys.readouterr().err
        mixed = [option, "optim_wrapper.type=AmpOptimWrapper", "--work-dir", str(tmp_path / "work")]
        assert main(["train-detector", str(config), *mixed]) == 2
        error = capsys.readouterr().err
        assert "needs a GPU" in error and "--no-amp" in error and error.count("\n") == 1
        assert not (tmp_path / "work").exists()
    for checkpoint, flags, says in (
        (junk, [], "truncated, corrupt or not a weights file"),
        (trained, [option, "model.neck.out_channels=16"], "is not of this config's model"),
        (trained, [option, "model.bbox_head.type=None1"], "the config names something unknown"),
    ):
        argv = ["test-detector", config, checkpoint, *flags, *work]
        assert main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and says in error, error


HOOK = """
import json, pathlib
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class SizesHook(Hook):
    def before_train(self, runner):
        self.rows = []
        detector = runner.model.module
        detector.backbone.register_forward_pre_hook(
            lambda module, args: self.rows.append(getattr(args[0], "valid_sizes", None)))

    def after_train(self, runner):
        total = sum(float(p.double().abs().sum()) for p in runner.model.module.parameters())
        rows = {"wrapper": type(runner.model).__name__, "sizes": self.rows, "weights": total}
        path = pathlib.Path(runner.work_dir, f"sizes{get_rank()}.json")
        path.write_text(json.dumps(rows))
"""


@pytest.mark.process
@pytest.mark.slow
def test_two_processes(data: Path, tmp_path: Path) -> None:
    (tmp_path / "sizes_hook.py").write_text(HOOK)
    more = "custom_imports['imports'].append('sizes_hook')\ncustom_hooks = [dict(type='SizesHook')]"
    if not torch.cuda.is_available():  # which is told, and batch norms are those of each process
        more += "\nsync_bn = 'torch'\nmodel['neck']['norm_cfg'] = dict(type='SyncBN')"
    config = detector(tmp_path / "two.py", data, more)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["tools/train_detector.py", config, "--launcher", "pytorch"]
    command += ["--work-dir", tmp_path / "work"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [json.loads((tmp_path / f"work/sizes{rank}.json").read_text()) for rank in (0, 1)]
    assert {row["wrapper"] for row in rows} == {"MMDistributedDataParallel"}
    assert all(sizes for row in rows for sizes in row["sizes"])
    assert rows[0]["weights"] == rows[1]["weights"]
