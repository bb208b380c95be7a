"""Modules that models are built from. Token maps are channels-last, [B, H, W, C]."""

from .conv_stem import ConvStem
from .depthwise import DepthwiseConv
from .gated_attention import GatedAttention
from .mlp import ConvMlp

__all__ = ["ConvMlp", "ConvStem", "DepthwiseConv", "GatedAttention"]
