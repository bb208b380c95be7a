"""The configurations of configs/detection and configs/segmentation: every published value, whom
weight decay reaches, that they train and predict, and the tables of their sizes.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter, defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests import golden
from tests.dense.openmmlab import packages
from vitlinear.checkpoints.mappings import H_VITTT, MILA, PYRAMID
from vitlinear.facts import family_of

pytestmark = packages()

import mmdet  # noqa: E402  (the line above says what is missing)
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402

from tools import count_dense  # noqa: E402

ROOT = Path(__file__).parents[2]
FACTS = yaml.safe_load((Path(__file__).parents[1] / "data" / "dense_recipes.yaml").read_text())
PATHS = {
    path.stem: path for folder in count_dense.SIZES for path in count_dense.config_paths(folder)
}
SAMPLES = [
    path
    for folder in count_dense.SIZES
    for path in sorted((ROOT / "configs" / folder).glob("*_test-*.py"))
]
# Configurations of mmdet's that have what ours have to have.
MMDET = f"{mmdet.__path__[0]}/.mim/configs"
SWIN = "mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
CASCADE = "cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
TOLERANCE = {"params": 0.01, "macs": 0.03}


def expand() -> dict[str, dict[str, Any]]:
    """The facts of each configuration."""
    facts = {}
    for group in FACTS["groups"]:
        for size in group["sizes"]:
            one = {**group, **FACTS["sizes"][group["family"]][size]}
            if isinstance(group["sizes"], dict):
                one["drop_path"] = group["sizes"][size]
            name = group["name"].format(size)
            one["model"] = f"{name.split('_')[1].replace('-', '_')}"
            facts[name] = {**one, **group.get("but", {}).get(size, {})}
    return facts


def kinds(names: list[str]) -> set[str]:
    """For each family the first configuration of the head that other families used least."""
    heads_of: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        head, model, *_ = name.split("_")
        heads_of[model.rpartition("-")[0]].setdefault(head, name)
    used: Counter[str] = Counter()
    found = set()
    for heads in sorted(heads_of.values(), key=len):
        head = min(heads, key=lambda head: used[head])
        used[head] += 1
        found.add(heads[head])
    assert set(used) == {head for heads in heads_of.values() for head in heads}
    return found


PUBLISHED = expand()
# In the order of the facts, which is from small to large.
KINDS = kinds(list(PUBLISHED))
QUICK = "mask-rcnn_ravlt-t_fpn_1x_coco"
each_config = pytest.mark.parametrize("name", sorted(PUBLISHED))


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """Building a detector takes seconds: one of each family and head, one in the inner loop."""
    if name == QUICK:
        return [pytest.mark.quick("dense", "detection")]
    return [] if name in KINDS else [pytest.mark.nightly]


each_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks_of(name)) for name in sorted(PUBLISHED)]
)


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """mmengine reads its index of some eighty files anew for every base of mmdet's."""
    with pytest.MonkeyPatch.context() as patch:
        from mmengine.config import utils

        patch.setattr(utils, "load", functools.cache(utils.load))
        logging.disable(logging.INFO)  # a line for every rule of every parameter
        yield
        logging.disable(logging.NOTSET)


@functools.cache
def config(name: str) -> Config:
    return Config.fromfile(PATHS[name])


def transforms(pipeline: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The steps of a pipeline by type."""
    return {step["type"]: step for step in pipeline}


def test_every_config_is_known():
    assert set(PATHS) == set(PUBLISHED)


@each_config
def test_model_as_published(name):
    c, facts = config(name), PUBLISHED[name]
    backbone, channels = c.model.backbone, facts["channels"]
    assert backbone.type == "vitlinear.Backbone" and backbone.model == facts["model"]
    assert backbone.drop_path_rate == facts["drop_path"]
    assert backbone.get("pretrained", False) == facts["weights"]
    assert backbone.get("out_norms", False) == (facts["norm_eps"] is not None)
    assert backbone.get("out_norm_eps", 1e-6) == (facts["norm_eps"] or 1e-6)
    assert (backbone.frozen_stages, backbone.norm_eval) == (-1, False)
    assert backbone.get("grad_checkpointing", False) == facts.get("checkpointing", False)
    assert c.get("sync_bn") == ("torch" if facts["sync_bn"] else None)
    assert c.get("find_unused_parameters", False) == facts.get("unused", False)

    head = name.partition("_")[0]
    skipped = head == "retinanet" and "l2vit" in name
    assert backbone.out_indices == ((1, 2, 3) if skipped else (0, 1, 2, 3))
    if head == "upernet":
        norm = {"type": facts.get("head_norm", "SyncBN"), "requires_grad": True}
        decode, auxiliary = c.model.decode_head, c.model.auxiliary_head
        assert decode.type == "UPerHead" and decode.in_channels == channels
        assert (decode.channels, decode.pool_scales) == (512, (1, 2, 3, 6))
        assert (auxiliary.in_channels, auxiliary.in_index) == (channels[2], 2)
        assert (auxiliary.channels, auxiliary.loss_decode.loss_weight) == (256, 0.4)
        for one in (decode, auxiliary):
            assert (one.num_classes, one.dropout_ratio, one.norm_cfg) == (150, 0.1, norm)
        return
    neck = c.model.neck
    assert neck.type == "FPN" and neck.out_channels == 256 and "norm_cfg" not in neck
    assert neck.in_channels == (channels[1:] if skipped else channels)
    assert neck.num_outs == (4 if head == "semantic-fpn" else 5)
    if head == "semantic-fpn":
        decode = c.model.decode_head
        assert (decode.type, decode.channels, decode.num_classes) == ("FPNHead", 128, 150)
        assert decode.dropout_ratio == 0.1 and decode.norm_cfg.type == "SyncBN"
        assert c.model.test_cfg.mode == "whole"
    elif head == "retinanet":
        assert (neck.start_level, neck.add_extra_convs) == (0 if skipped else 1, "on_input")
    elif head == "mask-rcnn":
        assert c.model.roi_head.bbox_head.type == "Shared2FCBBoxHead"
        assert c.model.roi_head.bbox_head.fc_out_channels == 1024
    else:
        assert c.model.roi_head.stage_loss_weights == [1, 0.5, 0.25]
        loss = c.model.rpn_head.loss_bbox
        assert (loss.type, loss.beta, loss.loss_weight) == ("SmoothL1Loss", 1 / 9, 1.0)
        theirs = Config.fromfile(
            f"{MMDET}/convnext/{CASCADE}", import_custom_modules=False
        ).model.roi_head.bbox_head
        assert c.model.roi_head.bbox_head == theirs


@pytest.mark.parametrize("path", SAMPLES + [PATHS["retinanet_ravlt-t_fpn_1x_coco"]])
def test_no_norm_of_a_map_is_left_without_a_gradient(path):
    """In several processes, unless the config says that they are to look for such."""
    c = Config.fromfile(path)
    unused = c.model.get("neck", {}).get("start_level", 0) > 0 and c.model.backbone.out_norms
    assert c.get("find_unused_parameters", False) >= unused


@each_config
def test_schedule_as_published(name):
    c, facts = config(name), PUBLISHED[name]
    wrapper = c.optim_wrapper
    assert wrapper.optimizer.type == "AdamW" and wrapper.get("clip_grad") is None
    assert wrapper.optimizer.get("betas", (0.9, 0.999)) == (0.9, 0.999)
    assert wrapper.optimizer.lr == pytest.approx(facts["lr"])
    assert wrapper.optimizer.weight_decay == facts["weight_decay"]
    assert set(wrapper.optimizer) <= {"type", "lr", "betas", "weight_decay"}
    amp = facts["loss_scale"] is not None
    assert wrapper.type == ("AmpOptimWrapper" if amp else "OptimWrapper")
    assert wrapper.get("loss_scale") == facts["loss_scale"]
    assert c.train_dataloader.batch_size == facts["batch"]
    assert c.auto_scale_lr == {"enable": False, "base_batch_size": facts["base_batch"]}

    *warmup, decay = c.param_scheduler
    if facts["warmup"]:
        (linear,) = warmup
        assert linear.type == "LinearLR" and linear.begin == 0 and not linear.by_epoch
        assert [linear.end, linear.start_factor] == facts["warmup"]
    else:
        assert not warmup
    if facts["task"] == "detection":
        assert c.train_cfg.max_epochs == decay.end == facts["epochs"]
        assert (decay.type, decay.milestones, decay.gamma) == ("MultiStepLR", facts["steps"], 0.1)
        assert decay.by_epoch
    else:
        assert c.train_cfg.max_iters == decay.end == facts["iterations"]
        assert (decay.type, decay.power, decay.by_epoch) == ("PolyLR", facts["power"], False)
        assert decay.eta_min == facts["min_lr"]
        assert decay.begin == (facts["warmup"] or [0])[0]
        checkpoint = c.default_hooks.checkpoint
        assert c.train_cfg.val_interval == checkpoint.interval == facts["every"]
        assert checkpoint.get("save_best") == ("mIoU" if facts["keep_best"] else None)


@each_config
def test_data_as_published(name):
    c, facts = config(name), PUBLISHED[name]
    pipeline = c.train_dataloader.dataset.pipeline
    steps = transforms(pipeline)
    assert steps["RandomFlip"]["prob"] == 0.5
    assert transforms(c.test_dataloader.dataset.pipeline)["Resize"]["keep_ratio"]
    test_scale = tuple(transforms(c.test_dataloader.dataset.pipeline)["Resize"]["scale"])
    if facts["task"] == "segmentation":
        resize, crop = steps["RandomResize"], steps["RandomCrop"]
        assert (resize["scale"], resize["ratio_range"]) == ((2048, 512), (0.5, 2.0))
        assert (crop["crop_size"], crop["cat_max_ratio"]) == ((512, 512), 0.75)
        assert "PhotoMetricDistortion" in steps and test_scale == (2048, 512)
        assert c.model.data_preprocessor.size == (512, 512)
        assert c.model.data_preprocessor.type == "vitlinear.SegDataPreProcessor"
        return
    assert c.model.data_preprocessor.type == "vitlinear.DetDataPreprocessor"
    assert c.model.data_preprocessor.pad_size_divisor == 32
    assert test_scale == (1333, 800)
    masks = not name.startswith("retinanet")
    assert steps["LoadAnnotations"].get("with_mask", False) == masks
    if not facts["many_scales"]:
        assert steps["Resize"]["scale"] == (1333, 800) and "RandomChoice" not in steps
        return
    theirs = Config.fromfile(f"{MMDET}/swin/{SWIN}").train_dataloader.dataset.pipeline
    if not masks:
        del transforms(theirs)["LoadAnnotations"]["with_mask"]
    assert pipeline == theirs


def on_cpu(name: str) -> ConfigDict:
    """The optimizer wrapper of a config as machines without a GPU can have it."""
    wrapper = config(name).optim_wrapper.copy()
    wrapper.pop("loss_scale", None)
    return ConfigDict({**wrapper, "type": "OptimWrapper"})


def undecayed(name: str) -> tuple[set[str], nn.Module]:
    """Names of the parameters that weight decay does not reach, and the model."""
    with torch.device("meta"):
        model = count_dense.build(config(name))
    groups = build_optim_wrapper(model, on_cpu(name)).optimizer.param_groups
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    rates = {group["weight_decay"] for group in groups} | {group["lr"] for group in groups}
    assert rates <= {0, config(name).optim_wrapper.optimizer.weight_decay} | {
        config(name).optim_wrapper.optimizer.lr
    }
    return {key for key, p in model.named_parameters() if id(p) in free}, model


def exempt_by_authors(model: str, every_norm: bool) -> set[str]:
    """Our names of what the authors' rules leave undecayed in a detector's backbone."""
    family = family_of(model)
    released = family.models[model].released
    mapping = {"vittt": H_VITTT, "mila": MILA}.get(family.name, PYRAMID)
    names = {f"backbone.norms.{i}.{part}" for i in range(4) for part in ("weight", "bias")}
    for key, *_ in golden.variants(golden.family_of(released) or family.name)[released][
        "state_dict"
    ]:
        if key.endswith(("running_mean", "running_var", "num_batches_tracked", "rotations")):
            continue
        stem_norm = key.startswith("patch_embed.proj.") and int(key.split(".")[2]) % 3 == 1
        if "norm" in key or (every_norm and stem_norm):
            names.add(f"backbone.model.{mapping.rename(key)}")
    # Of the classifier, which detectors do not have.
    return {key for key in names if not key.startswith("backbone.model.final.")}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in sorted(PUBLISHED)
        if any(model in name for model in ("ravlt-s", "mavit-b", "h-vittt-tiny", "mila-tiny"))
    ],
)
def test_weight_decay_reaches_what_it_does_upstream(name):
    free, model = undecayed(name)
    facts = PUBLISHED[name]
    backbone = {key for key in free if key.startswith("backbone.")}
    expected = set()
    if facts["undecayed"] != "none":
        expected = exempt_by_authors(facts["model"], facts["undecayed"] == "norms")
    assert backbone == expected
    heads = {
        f"{key}.{part}"
        for key, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) or type(module).__name__ == "_BatchNormXd"
        if not key.startswith("backbone.")
        for part in ("weight", "bias")
    }
    assert free - backbone == (heads if facts["undecayed"] == "norms" else set())
    assert bool(heads) == ("cascade" in name or facts["task"] == "segmentation")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, facts in sorted(PUBLISHED.items())
        if "-tiny" in name and facts["undecayed"] != "names"
    ],
)
def test_weight_decay_elsewhere(name):
    free, model = undecayed(name)
    rule = PUBLISHED[name]["undecayed"]
    if rule == "none":
        assert not free
        return
    names = [key for key, _ in model.named_parameters()]
    expected = {key for key in names if "norm" in key or "relative_position_bias_table" in key}
    assert free == expected
    assert any("bias_table" in key for key in free) == (rule == "swin")


def shrink(settings: ConfigDict) -> ConfigDict:
    """A model's config with few blocks and proposals and small batches, for a CPU."""
    settings = deepcopy(settings)
    settings.backbone.pretrained = False
    # Of each kind of block that a stage has, one: L2ViT's and Swin's alternate.
    isotropic = settings.backbone.model.startswith("lightnet")
    settings.backbone |= {"depth": 2} if isotropic else {"depths": (2, 2, 2, 2)}
    if "size" in settings.data_preprocessor:
        settings.data_preprocessor.size = (64, 64)
    if "roi_head" in settings:
        settings.train_cfg.rpn_proposal.max_per_img = settings.test_cfg.rpn.max_per_img = 20
        stages = settings.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 8
        settings.test_cfg.rcnn.max_per_img = 4
    return settings


def batch(name: str) -> dict[str, list[Any]]:
    """Two images of two sizes, with what they hold."""
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((64, 48), (50, 64))]
    return {"inputs": images, "data_samples": [sample(name, image) for image in images]}


def sample(name: str, image: torch.Tensor) -> Any:
    height, width = image.shape[1:]
    sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (height, width))
    if PUBLISHED[name]["task"] == "segmentation":
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        labels = PixelData(data=torch.randint(150, (1, height, width)))
        return SegDataSample(metainfo=sizes, gt_sem_seg=labels)
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    objects = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        labels=torch.tensor([3]),
        masks=BitmapMasks(masks.numpy(), height, width),
    )
    metainfo = {**sizes, "scale_factor": (1.0, 1.0), "batch_input_shape": (64, 64)}
    return DetDataSample(metainfo=metainfo, gt_instances=objects)


@each_kind
def test_trains_and_predicts(name):
    torch.manual_seed(0)
    c = Config({**config(name).to_dict(), "model": shrink(config(name).model)})
    model = count_dense.build(c)
    wrapper = build_optim_wrapper(model, on_cpu(name))
    model.train()
    data = model.data_preprocessor(batch(name), training=True)
    losses, logged = model.parse_losses(model(**data, mode="loss"))
    assert losses.isfinite() and len(logged) > 2
    wrapper.backward(losses)
    idle = {key for key, p in model.named_parameters() if p.grad is None}
    # DistributedDataParallel would wait for the gradients of these.
    assert {key.split(".")[1] for key in idle} <= (
        {"norms"} if PUBLISHED[name].get("unused") else set()
    )
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert nn.utils.get_total_norm(grads).isfinite()
    # The first layer of all: gradients reach it, and no rule keeps it back. An update of the rest
    # is as slow as the pass above.
    first = {}
    for key, parameter in model.named_parameters():
        if key.startswith(("backbone.model.stem", "backbone.model.patch")):
            first[parameter] = parameter.detach().clone()
        else:
            parameter.grad = None
    wrapper.step()
    assert any(not torch.equal(parameter, before) for parameter, before in first.items())

    model.eval()
    data = batch(name)
    # mmseg tests one image at a time.
    parts = [slice(0, 1), slice(1, 2)] if "decode_head" in c.model else [slice(2)]
    with torch.no_grad():
        outputs = [
            output
            for part in parts
            for output in model.test_step({key: values[part] for key, values in data.items()})
        ]
    assert len(outputs) == 2
    for output, size in zip(outputs, ((64, 48), (50, 64)), strict=True):
        if PUBLISHED[name]["task"] == "segmentation":
            assert output.pred_sem_seg.data.shape == (1, *size)
            assert output.seg_logits.data.isfinite().all()
        else:
            found = output.pred_instances
            assert found.bboxes.shape[1] == 4 and found.scores.isfinite().all()
            if not name.startswith("retinanet"):
                assert found.masks.shape[1:] == size


@each_kind
def test_table_is_up_to_date(name):
    path = PATHS[name]
    facts = count_dense.published(path.parent.name).get(name, {})
    line = count_dense.row(path, count_dense.count(path), facts)
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert line in readme.splitlines(), "run python tools/count_dense.py"


def table_rows() -> dict[str, list[str]]:
    """Cells of the two tables by the name of the config."""
    rows = {}
    for folder in count_dense.SIZES:
        text = (count_dense.CONFIGS / folder / "README.md").read_text(encoding="utf-8")
        for line in text.partition(count_dense.BEGIN)[2].splitlines():
            if line.startswith("| ["):
                cells = [cell.strip() for cell in line.strip("| ").split("|")]
                rows[cells[0][1:].partition("]")[0]] = cells
    return rows


def auxiliary_params(channels: int) -> int:
    """Of the auxiliary head of UperNet: 3x3 convolution, batch norm, 1x1 convolution with bias."""
    return 9 * channels * 256 + 2 * 256 + 256 * 150 + 150


def test_size_and_cost_as_published():
    rows = table_rows()
    assert set(rows) == set(PUBLISHED)
    published = {
        name: facts
        for folder in count_dense.SIZES
        for name, facts in count_dense.published(folder).items()
    }
    assert set(published) <= set(rows)
    compared = 0
    for name, facts in published.items():
        if "params" not in facts:
            continue
        params, macs = float(rows[name][1]), float(rows[name][3])
        if facts["source"] == "vittt" and name.startswith("upernet"):
            params -= auxiliary_params(PUBLISHED[name]["channels"][2]) / 1e6
        assert (
            abs(params / facts["params"] - 1) <= TOLERANCE["params"]
            or abs(params - facts["params"]) <= 0.5  # printed in whole millions
        ), name
        assert abs(macs / facts["macs"] - 1) <= TOLERANCE["macs"], name
        compared += 1
    assert compared >= 21
