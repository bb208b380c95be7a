"""Errors, on every process and before anything is exchanged, for what cannot be split."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.parallel.comparing import mesh_of_all
from vitlinear.errors import UserError
from vitlinear.models._valid_region import ValidRegion, use_valid_region
from vitlinear.parallel import gather_rows, parallelize, shard_rows, split_rows

pytestmark = pytest.mark.process

IMAGES = torch.zeros(1, 3, 64, 64)


def small() -> nn.Module:
    return timm.create_model("test_ravlt_linear").eval()


class Mixer(nn.Module):
    """A layer of nobody's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(1)


def _unknown_layer() -> None:
    model = small()
    model.stages[1].blocks[0].mlp = Mixer()
    kinds = [type(module) for module in model.modules()]
    try:
        parallelize(model, mesh_of_all())
    finally:
        assert [type(module) for module in model.modules()] == kinds


def _other_padding() -> None:
    model = small()
    model.stem.conv2.conv.padding_mode = "reflect"
    parallelize(model, mesh_of_all())


def _twice() -> None:
    parallelize(parallelize(small(), mesh_of_all()), mesh_of_all())


def _not_ours() -> None:
    parallelize(nn.Sequential(nn.Linear(3, 3)), mesh_of_all())


def _two_dimensions() -> None:
    parallelize(small(), init_device_mesh("cpu", (1, distributed.get_world_size())))


def _outside() -> None:
    parallelize(small(), mesh_of_all())(IMAGES)


def _head_outside() -> None:
    model = parallelize(small(), mesh_of_all())
    shard, rows = shard_rows(IMAGES, mesh_of_all())
    with rows, torch.no_grad():
        features = model.forward_features(shard)
    model.forward_head(features)


def _whole_image() -> None:
    model = parallelize(small(), mesh_of_all())
    with shard_rows(IMAGES, mesh_of_all())[1]:
        model(IMAGES)


def _padded() -> None:
    model = parallelize(small(), mesh_of_all())
    shard, rows = shard_rows(IMAGES, mesh_of_all())
    with rows, use_valid_region(ValidRegion((64, 64), [(60, 60)])):
        model(shard)


def _few_rows() -> None:
    shard_rows(IMAGES[:, :, :30], mesh_of_all())


def _no_rows_at_the_end() -> None:
    model = parallelize(small(), mesh_of_all())
    shard, rows = shard_rows(IMAGES, mesh_of_all(), sizes=(63, 1))
    with rows:
        model(shard)


def _wrong_sizes() -> None:
    split_rows(64, mesh_of_all(), sizes=(32, 31))


def _new_classifier() -> None:
    parallelize(small(), mesh_of_all()).reset_classifier(5)


def _fused() -> None:
    parallelize(small(), mesh_of_all()).fuse()


def _gathered_logits() -> None:
    gather_rows(torch.zeros(2, 10), split_rows(64, mesh_of_all()))


def _message(function: Callable[[], Any], error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        function()
    return str(caught.value)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (_unknown_layer, UserError, "stages.1.blocks.0.mlp (Mixer) cannot run on bands of rows"),
        (_other_padding, UserError, "stem.conv2.conv cannot run on bands of rows: it pads with"),
        (_twice, UserError, "the model is parallelised already"),
        (_not_ours, UserError, "cannot split Sequential into bands of rows"),
        (_two_dimensions, UserError, "along one dimension of a mesh, got one of 2"),
        (_outside, RuntimeError, "stem is part of a parallelised model"),
        (_head_outside, RuntimeError, "head.global_pool is part of a parallelised model"),
        (_whole_image, ValueError, "takes the rows of its process: 32 of the 64"),
        (_padded, ValueError, "padded batches cannot be split"),
        (_few_rows, UserError, "2 processes cannot share an image of 30 rows"),
        (_no_rows_at_the_end, UserError, "process 1 of the 2 that share an image has no row"),
        (_wrong_sizes, UserError, "sizes [32, 31] do not share 64 rows among 2 processes"),
        (_new_classifier, RuntimeError, "replace the classifier before"),
        (_fused, RuntimeError, "fuse the model before"),
        (_gathered_logits, UserError, "only maps [B, C, rows, W] and tokens"),
    ],
)
def test_refused(two, function, error, message):
    for said in two.run(_message, function, error):
        assert message in said
