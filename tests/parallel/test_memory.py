"""Memory that a process keeps for backward."""

import pytest
import torch

from benchmarks.saved import saved_bytes
from tests.as_trained import make
from tests.parallel.comparing import mesh_of_all
from vitlinear.parallel import parallelize, shard_rows

pytestmark = pytest.mark.process


def _shares(name: str) -> float:
    """Bytes that this process keeps, over those that one keeps of the whole image."""
    images = torch.randn(2, 3, 1024, 32)
    alone = saved_bytes(make(name, torch.float32).train(), images).total()
    mesh = mesh_of_all()
    model = parallelize(make(name, torch.float32).train(), mesh)
    shard, rows = shard_rows(images, mesh)
    with rows:
        return saved_bytes(model, shard.contiguous()).total() / alone


@pytest.mark.parametrize(
    "name", ["test_ravlt_linear", pytest.param("test_mila", marks=pytest.mark.nightly)]
)
def test_no_map_is_kept_twice(two, name):
    # Half, and the rows beside a cut: up to 2 for 16 on the smallest map.
    assert max(two.run(_shares, name)) < 0.5 * 1.05
