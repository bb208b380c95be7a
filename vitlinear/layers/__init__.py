"""Modules that models are built from. Token maps are channels-last, [B, H, W, C]."""

from .attend import check_attn_type, learns_temperature
from .ceil_conv import CeilConv
from .conv_norm_act import ConvNormAct
from .conv_stem import ConvStem, check_images
from .cross_shaped import CrossShapedAttention
from .depthwise import DepthwiseConv, ResidualDepthwiseConv
from .dynamic_conv import DynamicConv
from .fold import fold_scale
from .gated_attention import GatedAttention, NormGatedAttention
from .inline_attention import InjectiveAttention, InLineAttention, InLineTokenAttention
from .lightnet_attention import LightNetAttention
from .linear import Linear
from .linear_attention import LinearAttention
from .local_concentration import LocalConcentration
from .md_tpe import AxisTpe, MdTpe
from .mlp import ConvMlp, Mlp, SwiGlu
from .recompute import run_recomputing
from .report import AttentionCall, BackendReport, backend_report
from .rms_norm import HeadRmsNorm, RmsNorm
from .shifted_windows import ShiftedWindowAttention, SoftmaxAttention
from .window_attention import PaddedWindowAttention

__all__ = [
    "AttentionCall",
    "AxisTpe",
    "BackendReport",
    "CeilConv",
    "ConvMlp",
    "ConvNormAct",
    "ConvStem",
    "CrossShapedAttention",
    "DepthwiseConv",
    "DynamicConv",
    "GatedAttention",
    "HeadRmsNorm",
    "InLineAttention",
    "InLineTokenAttention",
    "InjectiveAttention",
    "LightNetAttention",
    "Linear",
    "LinearAttention",
    "LocalConcentration",
    "MdTpe",
    "Mlp",
    "NormGatedAttention",
    "PaddedWindowAttention",
    "ResidualDepthwiseConv",
    "RmsNorm",
    "ShiftedWindowAttention",
    "SoftmaxAttention",
    "SwiGlu",
    "backend_report",
    "check_attn_type",
    "check_images",
    "fold_scale",
    "learns_temperature",
    "run_recomputing",
]
