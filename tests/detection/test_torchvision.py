"""torchvision's detectors on our backbones: built, trained on photographs, scripted."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from tests.pairwise import pairwise
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.dense.coco import write_sample
from vitlinear.dense.padding import attach_valid_sizes
from vitlinear.dense.torchvision import fpn_backbone, mask_padding
from vitlinear.errors import UserError
from vitlinear.models import on_meta, our_models
from vitlinear.models._valid_region import valid_region

# One model of each kind; the siblings that attend linearly in every stage have the same layers.
NAMES = [name for name in our_models() if name.startswith("test_") and not name.endswith("_linear")]
WIDTH = 64  # of the FPN
CLASSES = 7  # with the background


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A cat, and a cup with a spoon: images and targets, as torchvision takes them."""
    pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("sample") / "coco"
    write_sample(folder)
    data = json.loads((folder / "annotations" / "instances_train.json").read_text())
    images, targets = [], []
    for record in data["images"]:
        if record["file_name"] not in ("chelsea.jpg", "coffee.jpg"):
            continue
        found = [note for note in data["annotations"] if note["image_id"] == record["id"]]
        images.append(read_image(folder / "images" / record["file_name"]))
        boxes = torch.tensor([note["bbox"] for note in found])
        boxes[:, 2:] += boxes[:, :2]
        masks = [outline(note["segmentation"], record) for note in found]
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.tensor([note["category_id"] for note in found]),
                "masks": torch.from_numpy(np.stack(masks)),
            }
        )
    assert len(images) == 2
    return images, targets


def read_image(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def outline(polygons: list[list[float]], record: dict) -> np.ndarray:
    mask = Image.new("L", (record["width"], record["height"]))
    for polygon in polygons:
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
    return np.array(mask)


def retinanet(name: str | nn.Module = "test_ravlt", side: int = 128) -> RetinaNet:
    args = {"out_indices": (1, 2, 3), "out_norms": True} if isinstance(name, str) else {}
    backbone = fpn_backbone(name, WIDTH, "p6p7", **args)
    return RetinaNet(backbone, CLASSES, min_size=side, max_size=2 * side)


def mask_rcnn(name: str | nn.Module = "test_ravlt", side: int = 128) -> MaskRCNN:
    """With narrow heads: torchvision's have 14M parameters."""
    args = {"out_norms": True} if isinstance(name, str) else {}
    return MaskRCNN(
        fpn_backbone(name, WIDTH, **args),
        min_size=side,
        max_size=2 * side,
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=64,
        box_head=TwoMLPHead(WIDTH * 7 * 7, 128),
        box_predictor=FastRCNNPredictor(128, CLASSES),
        mask_head=MaskRCNNHeads(WIDTH, (WIDTH, WIDTH), 1),
        mask_predictor=MaskRCNNPredictor(WIDTH, WIDTH, CLASSES),
    )


def train(detector: nn.Module, images, targets, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(detector.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    detector.train()
    for _ in range(steps):
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    detector.eval()


def check_found(found: dict[str, Tensor], target: dict[str, Tensor], masks: bool) -> None:
    """Every object, by the boxes with the highest scores, and nothing else that overlaps none.

    Mask R-CNN has no sure box that is not an object's. RetinaNet, trained as shortly, has some
    beside objects on some processors; its loss leaves out anchors that overlap one by 0.4 to 0.5.
    """
    sure = found["scores"] > 0.5
    ious = box_iou(target["boxes"], found["boxes"][sure])
    same = target["labels"][:, None] == found["labels"][sure]
    best, index = (ious * same)[:, : len(target["boxes"])].max(dim=1)  # scores fall
    assert (best > 0.75).all() and (ious.amax(dim=0) > (0.5 if masks else 0)).all()
    if masks:
        drawn, wanted = found["masks"][sure][index, 0] > 0.5, target["masks"].bool()
        overlap = (drawn & wanted).sum((1, 2)) / (drawn | wanted).sum((1, 2))
        assert (overlap > 0.75).all()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("make, steps", [(retinanet, 100), (mask_rcnn, 120)])
def test_objects_are_found(make, steps, photographs):
    detector = make()
    images, targets = photographs
    train(detector, images, targets, steps, lr=2e-3)
    with torch.no_grad():
        for found, target in zip(detector(images), targets, strict=True):
            check_found(found, target, masks=make is mask_rcnn)


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_every_family_gives_maps_of_one_width(name):
    backbone = fpn_backbone(name, WIDTH)
    maps = backbone(torch.randn(1, 3, 64, 128))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    for i, x in enumerate(maps.values()):
        assert x.shape == (1, WIDTH, 16 >> i, 32 >> i) and x.shape[1] == backbone.out_channels
    sum(x.square().mean() for x in maps.values()).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("detector", [RetinaNet, FCOS, FasterRCNN])
def test_detectors_train_and_predict(detector):
    """Gradients into the backbone, also from a batch in which one image has no objects."""
    args = {} if detector is FasterRCNN else {"out_indices": (1, 2, 3), "extra_blocks": "p6p7"}
    model = detector(fpn_backbone("test_lightnet", WIDTH, **args), 3, min_size=96, max_size=128)
    images = [torch.rand(3, 80, 100), torch.rand(3, 90, 70)]
    targets = [
        {"boxes": torch.tensor([[10.0, 12, 60, 70]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    weights = [parameter.grad for parameter in model.backbone.body.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in weights)
    empty = model(images[:1], targets[1:])
    assert all(value.isfinite() for value in empty.values())
    found = model.eval()(images)
    assert len(found) == 2 and {"boxes", "labels", "scores"} <= found[0].keys()


def random(detector: nn.Module) -> nn.Module:
    """In float64, with detections that differ from each other."""
    for key, parameter in detector.named_parameters():
        if not key.startswith("backbone."):
            nn.init.normal_(parameter, std=0.05)
    return detector.double().eval()


@pairwise(every=2, name=NAMES, size=[(64, 96), (50, 83)])
def test_maps_of_a_padded_batch(name, size):
    """The same for an image alone and in a batch, whoever built the body."""
    backbone = fpn_backbone(name, 32, "p6p7").double().eval()
    batch = torch.randn(2, 3, 128, 192).double()
    alone = torch.zeros(1, 3, 64, 96).double()
    alone[0, :, : size[0], : size[1]] = batch[0, :, : size[0], : size[1]]
    bare = backbone(batch)
    expected = backbone(attach_valid_sizes(alone, [size]))
    maps = backbone(attach_valid_sizes(batch, [size, (128, 192)]))
    for key, x in expected.items():
        if on_meta(name).rounds_down and key in ("p6", "p7"):
            continue  # see `mask_padding`
        rows, columns = x.shape[2:]
        torch.testing.assert_close(maps[key][:1, :, :rows, :columns], x)
        edge = maps[key][0, :, -1, -1]  # repeated to the end of the padding
        torch.testing.assert_close(edge, x[0, :, -1, -1])
    assert (bare["0"][0, :, :8, :8] - expected["0"][0, :, :8, :8]).norm() > 1e-3


def test_maps_of_a_features_only_model():
    body = timm.create_model("test_l2vit", features_only=True)
    backbone = fpn_backbone(body, 32).double().eval()
    batch = torch.randn(2, 3, 64, 96).double()
    expected = backbone(batch[:1, :, :32, :64].clone())
    maps = backbone(attach_valid_sizes(batch, [(32, 64), (64, 96)]))
    for key, x in expected.items():
        torch.testing.assert_close(maps[key][:1, :, : x.shape[2], : x.shape[3]], x)


@pytest.mark.parametrize("make", [retinanet, mask_rcnn])
def test_batching_changes_no_detection(make):
    plain = random(make(side=64))
    if make is mask_rcnn:
        plain.rpn.min_size = 4.0  # a place of the finest map; see `mask_padding`
    masked = copy.deepcopy(mask_padding(copy.deepcopy(plain)))
    one, other = torch.rand(3, 64, 40).double(), torch.rand(3, 64, 120).double()
    with torch.no_grad():
        alone, batched = masked([one])[0], masked([one, other])[0]
        assert len(alone["scores"]) > 10
        torch.testing.assert_close(alone, batched)
        unlike = plain([one])[0]["scores"][:10] - plain([one, other])[0]["scores"][:10]
        assert unlike.abs().max() > 1e-3  # which is what it is for


@pytest.mark.parametrize("make", [retinanet, mask_rcnn])
def test_boxes_are_in_the_coordinates_of_the_image(make):
    """Of an image that is resized; a detector keeps the mode that it was in."""
    plain = random(make(side=64))
    masked = mask_padding(copy.deepcopy(plain))
    image = torch.rand(3, 32, 32).double()  # twice as large when it is looked at
    with torch.no_grad():
        torch.testing.assert_close(masked([image]), plain([image]))
    assert mask_padding(make(side=64).train()).transform.training


class Brighter(GeneralizedRCNNTransform):
    """A transform of ones own."""

    def normalize(self, image: Tensor) -> Tensor:
        return super().normalize(image) + 1


def test_a_transform_of_ones_own_stays():
    detector = retinanet(side=64)
    detector.transform = Brighter(64, 128, [0.5] * 3, [0.25] * 3)
    images = [torch.rand(3, 64, 40), torch.rand(3, 64, 120)]
    expected, _ = detector.transform(images)
    batch, _ = mask_padding(detector).transform(images)
    assert batch.tensors.equal(expected.tensors) and not hasattr(expected.tensors, "valid_sizes")
    assert batch.tensors.valid_sizes == tuple(batch.image_sizes)


class Plain(nn.Conv2d):
    """A backbone that knows of no padding."""

    out_channels = 8


def test_detectors_whose_padding_cannot_be_masked():
    plain = RetinaNet(Plain(3, 8, 1), CLASSES, AnchorGenerator(((8,),), ((1.0,),)))
    with pytest.raises(UserError, match="nothing for a backbone that is a Plain"):
        mask_padding(plain)
    with pytest.raises(UserError, match="Conv2d lacks its transform or backbone"):
        mask_padding(nn.Conv2d(3, 8, 1))
    assert not plain.head._forward_hooks and not plain.transform._forward_hooks


@pytest.mark.parametrize("make", [retinanet, mask_rcnn])
def test_masking_twice_is_masking_once(make):
    once = mask_padding(random(make(side=64)))
    twice = mask_padding(copy.deepcopy(once))
    assert mask_padding(twice) is twice

    def hooks(detector):
        parts = detector.modules()
        return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts]

    assert hooks(twice) == hooks(once) and type(twice.transform) is type(once.transform)
    images = [torch.rand(3, 64, 40).double(), torch.rand(3, 64, 120).double()]
    with torch.no_grad():
        assert len(once(images)[0]["scores"]) > 10
        torch.testing.assert_close(twice(images), once(images), rtol=0, atol=0)


def test_threads_share_a_detector():
    """Each with a region of its own, from the first pass on, which adds the hooks."""
    detector = mask_padding(random(retinanet(side=32)))
    batches = [
        [torch.rand(3, 32, 24 + 8 * i).double(), torch.rand(3, 32, 64).double()] for i in range(4)
    ] * 3

    @torch.no_grad()
    def find(batch):
        return detector(batch), valid_region()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(find, batches))
    for batch, (together, region) in zip(batches, found, strict=True):
        assert region is None  # nothing is left behind in the thread
        torch.testing.assert_close(together, find(batch)[0], rtol=0, atol=0)


def test_a_pass_that_fails_leaves_no_region():
    detector = mask_padding(random(retinanet(side=32)))
    images = [torch.rand(3, 32, 24).double(), torch.rand(3, 32, 64).double()]

    def fail(*args):
        raise RuntimeError("on purpose")

    head = detector.head
    for part, first in ((head.regression_head, False), (head, True)):
        handle = part.register_forward_pre_hook(fail, prepend=first)
        with pytest.raises(RuntimeError, match="on purpose"), torch.no_grad():
            detector(images)
        handle.remove()
        assert valid_region() is None
    with torch.no_grad():
        detector(images)


@pytest.mark.parametrize("make", [retinanet, mask_rcnn])
def test_training_with_masked_padding(make):
    model = mask_padding(random(make(side=64))).train()
    images = [torch.rand(3, 64, 40).double(), torch.rand(3, 64, 120).double()]
    target = {"boxes": torch.tensor([[5.0, 8, 35, 60]]).double(), "labels": torch.tensor([2])}
    target["masks"] = torch.ones(1, 64, 40, dtype=torch.uint8)
    other = {**target, "masks": torch.ones(1, 64, 120, dtype=torch.uint8)}
    losses = model(images, [target, other])
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss < 1e3 for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("extra, names", [(None, []), ("pool", ["pool"]), ("p6p7", ["p6", "p7"])])
def test_coarser_maps(extra, names):
    body = MultiScaleBackbone("test_mavit", out_indices=(1, 2, 3))
    maps = fpn_backbone(body, 32, extra, norm_layer=nn.BatchNorm2d)(torch.randn(1, 3, 256, 256))
    assert list(maps) == ["0", "1", "2", *names]
    assert [x.shape[-1] for x in maps.values()] == [32 >> i for i in range(len(maps))]


def test_a_block_of_ones_own():
    blocks = LastLevelMaxPool()
    assert fpn_backbone("test_ravlt", extra_blocks=blocks).fpn.extra_blocks is blocks


@pytest.mark.parametrize("make", [retinanet, mask_rcnn])
def test_scripted(make):
    """With a features_only model. Scripted, torchvision may resize to one pixel less; not here."""
    indices = (1, 2, 3) if make is retinanet else (0, 1, 2, 3)
    body = timm.create_model("test_ravlt", features_only=True, out_indices=indices)
    detector = random(make(body, side=64))
    images = [torch.rand(3, *size).double() for size in [(64, 80), (64, 48)]]
    scripted = torch.jit.script(detector)
    for found, expected in zip(scripted(images)[1], detector(images), strict=True):
        assert len(expected["scores"]) > 3
        torch.testing.assert_close(found, expected)


def test_a_trained_detector_gives_its_stages(tmp_path):
    """To another backbone, and to timm's features_only models."""
    detector = mask_rcnn()
    torch.save({"model": detector.state_dict()}, tmp_path / "detector.pth")
    weights = detector.backbone.body.model.state_dict()
    backbone = MultiScaleBackbone("test_ravlt", checkpoint_path=tmp_path / "detector.pth")
    assert all(value.equal(weights[key]) for key, value in backbone.model.state_dict().items())
    features = timm.create_model(
        "test_ravlt",
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "detector.pth")},
    )
    images = torch.randn(1, 3, 64, 64)
    expected = backbone.eval()(images)
    assert all(x.equal(y) for x, y in zip(features.eval()(images), expected, strict=True))


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        ("test_ravllt", {}, "unknown model 'test_ravllt'"),
        ("test_ravlt", {"extra_blocks": "p7"}, "'pool', 'p6p7' or None, got 'p7'"),
        ("test_ravlt", {"out_indices": (0, 2)}, r"strides double, not \[4, 16\]"),
        (lambda: MultiScaleBackbone("test_ravlt"), {"out_norms": True}, "out_norms: only for"),
        (lambda: timm.create_model("test_ravlt"), {}, "RAVLT gives no maps"),
        (
            lambda: timm.create_model("test_lightnet", features_only=True),
            {},
            r"double, not \[16, 16, 16\].*by its name",
        ),
    ],
)
def test_what_cannot_be_made(model, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        fpn_backbone(model if isinstance(model, str) else model(), **arguments)
    assert "\n" not in str(caught.value)
