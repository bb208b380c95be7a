"""The maps of a detector's backbone on rows of images, and gradients of a loss of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from tests.parallel.comparing import LEAST, difference, mesh_of_all
from tests.parallel.ranks import Ranks
from vitlinear.dense.backbone import MultiScaleBackbone
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
    parallelize(parts.model, mesh)
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
@pytest.mark.parametrize("name", ["test_ravlt_linear"])
def test_backbone(two: Ranks, name: str) -> None:
    for worst in two.run(worst_of_backbone, name, 105):
        assert worst == pytest.approx(dict.fromkeys(worst, 0), abs=1e-10)
