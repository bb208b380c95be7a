"""Modules that models are built from. Token maps are channels-last, [B, H, W, C]."""

from .conv_stem import ConvStem, check_images
from .depthwise import DepthwiseConv
from .gated_attention import GatedAttention, NormGatedAttention
from .lightnet_attention import LightNetAttention
from .linear_attention import LinearAttention
from .local_concentration import LocalConcentration
from .md_tpe import AxisTpe, MdTpe
from .mlp import ConvMlp
from .report import AttentionCall, BackendReport, backend_report
from .rms_norm import HeadRmsNorm, RmsNorm
from .window_attention import PaddedWindowAttention

__all__ = [
    "AttentionCall",
    "AxisTpe",
    "BackendReport",
    "ConvMlp",
    "ConvStem",
    "DepthwiseConv",
    "GatedAttention",
    "HeadRmsNorm",
    "LightNetAttention",
    "LinearAttention",
    "LocalConcentration",
    "MdTpe",
    "NormGatedAttention",
    "PaddedWindowAttention",
    "RmsNorm",
    "backend_report",
    "check_images",
]
