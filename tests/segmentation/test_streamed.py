"""Segmentors of mmseg, built from our configs, on an image that is streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitlinear
from tests.dense.openmmlab import build, packages
from vitlinear.dense.streamed_head import segmentor_head
from vitlinear.errors import UserError

pytestmark = [packages(), pytest.mark.usefixtures("all_memory_free")]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "segmentation"
WIDTHS = [24, 48, 64, 96]


def segmentor(name: str, **options: Any) -> Any:
    """A segmentor of random weights, norms with statistics, in evaluation and float64."""
    from mmengine.config import Config

    config = Config.fromfile(CONFIGS / f"{name}.py")
    config.merge_from_dict({"model.backbone.pretrained": False, **options})
    torch.manual_seed(0)
    model = build(config.model, "mmseg").double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


SMALL = {
    "model.backbone.model": "test_ravlt_linear",
    "model.neck.in_channels": WIDTHS,
    "model.neck.out_channels": 8,
    "model.decode_head.in_channels": [8, 8, 8, 8],
    "model.decode_head.channels": 8,
    "model.decode_head.num_classes": 5,
}
WHOLE = [pytest.mark.nightly, pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("semantic-fpn_ravlt-t_8xb2-80k_ade20k-512x512", SMALL),
        *(
            pytest.param(f"semantic-fpn_{name}_8xb2-80k_ade20k-512x512", {}, marks=WHOLE)
            for name in ("ravlt-t", "mavit-t")
        ),
    ],
)
def test_logits_are_those_of_the_segmentor(name: str, options: dict[str, Any]) -> None:
    model = segmentor(name, **options)
    image = np.random.default_rng(0).standard_normal((3, 256, 64))
    with torch.no_grad():
        expected = model(torch.from_numpy(image)[None], mode="tensor")
    streamed = vitlinear.stream(
        model.backbone.model, image, output=segmentor_head(model), band_rows=4
    )
    assert streamed.shape == expected.shape == (1, model.num_classes, 64, 16)
    assert torch.allclose(streamed, expected, rtol=0, atol=1e-10 * expected.abs().max())


def test_a_head_that_pools_the_image_is_refused() -> None:
    """UperNet's pyramid pooling sees all rows at once."""
    model = segmentor("upernet_test-ravlt_sample")
    image = np.zeros((3, 256, 64))
    with pytest.raises(UserError, match="as a pooling over the whole map does"):
        vitlinear.stream(model.backbone.model, image, output=segmentor_head(model), band_rows=4)
