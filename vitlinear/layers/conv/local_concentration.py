"""Local concentration module of L2ViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..band import LOCAL
from .depthwise_conv import DepthwiseConv


class LocalConcentration(nn.Module):
    """dw7(BN(GELU(dw7(x)))): gathers what linear attention has spread too evenly.

    Source: L2ViT, arXiv:2501.16182.
    """

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the module.

        Args:
            dim: Channels, C.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.conv1 = DepthwiseConv(dim, 7, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.conv2 = DepthwiseConv(dim, 7, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.act(self.conv1(x))
        x = self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.conv2(x)
