"""mmcv's operators see our maps as they are."""

import pytest
import torch
from torchvision.ops import roi_align

from tests.dense.openmmlab import packages

pytestmark = packages()

from mmcv.ops import RoIAlign  # noqa: E402
from mmdet.models.necks import FPN  # noqa: E402

from vitlinear.dense.openmmlab import Backbone  # noqa: E402


@pytest.mark.parametrize("model", ["test_ravlt", "test_l2vit", "test_inline_swin", "test_lightnet"])
@pytest.mark.parametrize("out_norms", [False, True])
def test_regions_of_the_pyramid(model: str, out_norms: bool) -> None:
    """Read as if they were contiguous, maps in channels-last order gave wrong regions."""
    torch.manual_seed(0)
    backbone = Backbone(model, out_norms=out_norms).eval()
    neck = FPN(in_channels=list(backbone.channels), out_channels=16, num_outs=4)
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 64, 96))
        assert all(level.is_contiguous() for level in maps)
        pyramid = neck(maps)
    regions = torch.tensor([[0, 3.0, 5.0, 60.0, 40.0], [1, 10.0, 0.0, 90.0, 60.0]])
    for level, stride in zip(pyramid, (4, 8, 16, 32), strict=True):
        expected = roi_align(level, regions, 7, 1 / stride, 2, aligned=True)
        found = RoIAlign(7, 1 / stride, 2)(level, regions)
        assert torch.allclose(found, expected, atol=1e-5)
