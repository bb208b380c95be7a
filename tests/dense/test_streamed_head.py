"""A segmentor's logits of an image that is streamed."""

import numpy as np
import pytest
import torch
from torch import nn

import vitlinear
from tests.streaming.test_views import PyramidHead
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.dense.streamed_head import segmentor_head
from vitlinear.errors import UserError

pytestmark = pytest.mark.usefixtures("all_memory_free")


class Segmentor(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = MultiScaleBackbone("test_ravlt_linear", out_norms=True)
        self.decode_head = PyramidHead(self.backbone.channels)

    def forward(self, image):
        return self.decode_head(self.backbone(image))


def test_logits_are_those_of_the_segmentor():
    torch.manual_seed(0)
    segmentor = Segmentor().double().eval()
    image = np.random.default_rng(0).standard_normal((3, 128, 64))
    with torch.no_grad():
        expected = segmentor(torch.from_numpy(image)[None])
    head = segmentor_head(segmentor)
    streamed = vitlinear.stream(segmentor.backbone.model, image, output=head, band_rows=3)
    assert torch.allclose(streamed, expected, atol=1e-10)


def test_other_backbones_are_refused():
    with pytest.raises(UserError, match="a MultiScaleBackbone is needed"):
        segmentor_head(nn.Identity())
