"""Modules that models are built from. Token maps are channels-last, [B, H, W, C]."""

from .attention.cross_shaped_attention import CrossShapedAttention
from .attention.gated_attention import GatedAttention, NormGatedAttention
from .attention.inline_attention import InjectiveAttention, InLineAttention, InLineTokenAttention
from .attention.lightnet_attention import LightNetAttention
from .attention.linear_attention import LinearAttention
from .attention.mila_attention import InputValueAttention, MilaAttention
from .attention.padded_window_attention import PaddedWindowAttention
from .attention.scriptable import check_attn_type, learns_temperature
from .attention.shifted_window_attention import ShiftedWindowAttention
from .attention.softmax_attention import SoftmaxAttention
from .conv.ceil_conv import CeilConv
from .conv.conv_norm_act import ConvNormAct
from .conv.conv_stem import ConvStem, check_images
from .conv.depthwise_conv import DepthwiseConv, ResidualDepthwiseConv
from .conv.dynamic_conv import DynamicConv
from .conv.inverted_bottleneck import InvertedDownsample, InvertedStem
from .conv.local_concentration import LocalConcentration
from .fold import fold_scale
from .layout import known_layout
from .linear import Linear
from .mlp import ConvMlp, Mlp, SwiGlu
from .plain import is_exact_gelu, is_plain
from .positions.learned import AddMapPositions, AddTokenPositions
from .positions.map_rotary import MapFullWidthRotaryTables, MapRotaryTables
from .positions.md_tpe import AxisTpe, MdTpe
from .pytorch_layers import use_pytorch_layers
from .recompute import recomputes
from .rms_norm import HeadRmsNorm, RmsNorm

__all__ = [
    "AddMapPositions",
    "AddTokenPositions",
    "AxisTpe",
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
    "InputValueAttention",
    "InvertedDownsample",
    "InvertedStem",
    "LightNetAttention",
    "Linear",
    "LinearAttention",
    "LocalConcentration",
    "MapFullWidthRotaryTables",
    "MapRotaryTables",
    "MdTpe",
    "MilaAttention",
    "Mlp",
    "NormGatedAttention",
    "PaddedWindowAttention",
    "ResidualDepthwiseConv",
    "RmsNorm",
    "ShiftedWindowAttention",
    "SoftmaxAttention",
    "SwiGlu",
    "check_attn_type",
    "check_images",
    "fold_scale",
    "is_exact_gelu",
    "is_plain",
    "known_layout",
    "learns_temperature",
    "recomputes",
    "use_pytorch_layers",
]
