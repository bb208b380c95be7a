"""The maps of a detector's backbone on rows of images, and gradients of a loss of them."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, distributed, nn

from tests.parallel.comparing import LEAST, difference, mesh_of_all
from tests.parallel.ranks import Ranks
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.errors import UserError
from vitlinear.layers.band import LOCAL
from vitlinear.parallel import gather_rows, parallelize, shard_rows


def loss_sum(maps: Any) -> Tensor:
    """A sum over places, as that of a dense loss before it is divided by their number."""
    return torch.stack(
        [(x * torch.linspace(-1, 1, x.shape[1])[:, None, None]).square().sum() for x in maps]
    ).sum()


def worst_of_backbone(name: str, height: int, **kwargs: Any) -> dict[str, float]:
    """Differences of maps and gradients from those of the whole image."""
    torch.manual_seed(0)
    whole = MultiScaleBackbone(name, out_norms=True, **kwargs).double()
    torch.manual_seed(0)
    parts = MultiScaleBackbone(name, out_norms=True, **kwargs).double()
    images = torch.randn(2, 3, height, 64, dtype=torch.float64)
    expected = whole(images)
    count = sum(x.numel() for x in expected)
    (loss_sum(expected) / count).backward()

    mesh = mesh_of_all()
    parallelize(parts, mesh)
    shard, rows = shard_rows(images, mesh)
    with rows:
        found = parts(shard)
        (loss_sum(found) * mesh.size() / count).backward()
        maps = [gather_rows(x, rows) for x in found]
    gradients = []
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        distributed.all_reduce(ours.grad)
        gradients.append(difference(ours.grad / mesh.size(), theirs.grad, LEAST))
    return {
        "maps": max(map(difference, maps, expected)),
        "gradients": max(gradients),
    }


@pytest.mark.process
@pytest.mark.parametrize("name", ["test_ravlt_linear", "test_linear_deit"])
def test_backbone(two: Ranks, name: str) -> None:
    """Of four stages, and of one resolution with a pyramid, which pools pairs of rows."""
    for worst in two.run(worst_of_backbone, name, 105):
        assert worst == pytest.approx(dict.fromkeys(worst, 0), abs=1e-10)


class Around(nn.Module):
    """The finest map of a model, and layers behind it."""

    row_rule = LOCAL

    def __init__(self, indices: Sequence[int], *layers: nn.Module) -> None:
        super().__init__()
        self.backbone = MultiScaleBackbone("test_ravlt_linear", out_indices=indices)
        self.head = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.backbone(x)[0])
        return result


def layers_around(kind: str) -> tuple[dict[str, float], Tensor]:
    """Differences of statistics from those of whole images, and what the layers around gave."""
    torch.manual_seed(0)
    if kind == "maps":
        last = nn.Conv2d(64, 3, 1, bias=False), nn.BatchNorm2d(3), DropPath(0.5)
        model: Any = Around((2,), *last).double()
    else:
        classifier = timm.create_model("test_ravlt_linear", num_classes=3)
        model = nn.Sequential(classifier, nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    images = torch.randn(8, 3, 64, 32).double() * torch.linspace(0.1, 3, 64)[:, None]
    whole = copy.deepcopy(model).train()
    whole(images)
    mesh = mesh_of_all()
    parallelize(model.train(), mesh)
    shard, rows = shard_rows(images, mesh)
    torch.manual_seed(torch.distributed.get_rank())  # draws of its own
    with rows, torch.no_grad():
        found = model(shard)
    pairs = zip(model.buffers(), whole.buffers(), strict=True)
    worst = {"statistics": max(difference(a, b) for a, b in pairs)}
    return worst, found.flatten(2).ne(0).any(2) if kind == "maps" else found.detach()


@pytest.mark.process
@pytest.mark.parametrize("kind", ["maps", "logits"])
def test_norms_and_drops_around_a_model(two: Ranks, kind: str) -> None:
    (worst, found), (same, other) = two.run(layers_around, kind)
    assert worst == same == pytest.approx({"statistics": 0}, abs=1e-10)
    assert found.equal(other) and 0 < found.ne(0).sum() < found.numel()


def errors_of_backbones() -> list[str]:
    """The errors of cuts amid pooled rows, of another map, and of layers around the model."""
    torch.manual_seed(0)
    mesh, found = mesh_of_all(), []
    pooling = parallelize(MultiScaleBackbone("test_linear_deit"), mesh)
    shard, rows = shard_rows(torch.zeros(1, 3, 64, 32), mesh, sizes=(48, 16))
    holder = nn.Sequential(MultiScaleBackbone("test_ravlt_linear"), nn.Conv2d(8, 8, 3, padding=1))
    both = nn.ModuleList([MultiScaleBackbone("test_ravlt_linear") for _ in range(2)])
    finer = parallelize(Around((1, 2), nn.MaxPool2d(2)), mesh)
    for call in (
        lambda: pooling(shard),
        lambda: finer(shard),
        *(lambda m=m: parallelize(m, mesh) for m in (holder, both)),
    ):
        try:
            with rows:
                call()
            found.append("no error")
        except UserError as error:
            found.append(str(error))
    assert type(holder[1]) is nn.Conv2d
    return found


@pytest.mark.process
def test_what_a_backbone_cannot_do(two: Ranks) -> None:
    for cut, finer, layer, several in two.run(errors_of_backbones):
        assert "pools 2 rows, and a process begins at row 3 of 4" in cut
        assert "head.0 pools a map of which this process has" in finer
        assert "1 (Conv2d) stands around the model" in layer
        assert "ModuleList holds several models, 0.model, 1.model: parallelise each" in several
