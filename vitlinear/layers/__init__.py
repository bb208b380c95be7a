"""Modules that models are built from. Token maps are channels-last, [B, H, W, C]."""

from .conv_stem import ConvStem, check_images
from .depthwise import DepthwiseConv
from .gated_attention import GatedAttention, NormGatedAttention
from .linear_attention import LinearAttention
from .local_concentration import LocalConcentration
from .mlp import ConvMlp
from .report import AttentionCall, BackendReport, backend_report
from .window_attention import PaddedWindowAttention

__all__ = [
    "AttentionCall",
    "BackendReport",
    "ConvMlp",
    "ConvStem",
    "DepthwiseConv",
    "GatedAttention",
    "LinearAttention",
    "LocalConcentration",
    "NormGatedAttention",
    "PaddedWindowAttention",
    "backend_report",
    "check_images",
]
