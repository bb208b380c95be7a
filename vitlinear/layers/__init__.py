"""Modules that models are built from. Token maps are channels-last, [B, H, W, C]."""

from .conv_stem import ConvStem, check_images
from .depthwise import DepthwiseConv
from .gated_attention import GatedAttention, NormGatedAttention
from .mlp import ConvMlp
from .report import AttentionCall, BackendReport, backend_report

__all__ = [
    "AttentionCall",
    "BackendReport",
    "ConvMlp",
    "ConvStem",
    "DepthwiseConv",
    "GatedAttention",
    "NormGatedAttention",
    "backend_report",
    "check_images",
]
