"""NaLaFormer: norm-aware linear attention transformer.

Norm-aware linear attention (NaLaFormer)
- paper: https://arxiv.org/abs/2506.21137
- code by the authors: https://github.com/ZacharyMeng/NaLaFormer; no weights are published yet

Written from the definition. Published models attend with NaLa in stages 1 and 2 and with softmax in
stages 3 and 4; `nalaformer_*_linear` attend with NaLa in all four.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitlinear.layers import NormGatedAttention, ResidualDepthwiseConv, is_plain
from vitlinear.layers.band import LOCAL
from vitlinear.ops import RotaryTables

from ._build import build_model
from ._pyramid import SIZES, LinearPyramid, PyramidBlock, linear_types, published_types, pyramid_cfg

__all__ = ["NaLaFormer"]


class NaLaBlock(PyramidBlock):
    """The block of the pyramid with a second positional convolution and a normalised gate."""

    row_rule = LOCAL

    attn_layer = NormGatedAttention
    norms_gate = True

    def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.pos2 = ResidualDepthwiseConv(dim, 3, **dd)

    def forward(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.pos(x)
        x = self.pos2(x + self.drop_path1(self.ls1(self.normed_attention(x, rotary))))
        x = x + self.drop_path2(self.ls2(self.normed_mlp(x)))
        return x

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """As `PyramidBlock`."""
        if is_plain(self, NaLaBlock):
            self.fold_scales()
        return self


class NaLaFormer(LinearPyramid):
    """The pyramid with norm-aware linear attention; arguments as `LinearPyramid`."""

    block_layer = NaLaBlock


# Source: released code, NaLaformer/NALA.py; dimensions and depths but XT's are RALA's.
VARIANTS: dict[str, dict[str, Any]] = {
    "xt": {
        "embed_dims": (32, 64, 128, 384),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 12),
    },
    "t": {**SIZES["t"], "mlp_ratios": (4.0, 4.0, 4.0, 4.0)},
    "s": SIZES["s"],
    "b": {**SIZES["b"], "mlp_ratios": (4.0, 4.0, 4.0, 4.0)},
    "l": SIZES["l"],
    "test": SIZES["test"],
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return pyramid_cfg(
        paper_ids="arXiv:2506.21137",
        paper_name="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
        origin_url="https://github.com/ZacharyMeng/NaLaFormer",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        **{f"nalaformer_{size}.untrained": _cfg() for size in ("xt", *"tsbl")},
        **{f"nalaformer_{size}_linear.untrained": _cfg() for size in ("xt", *"tsbl")},
        "test_nalaformer.untrained": _cfg(test=True),
        "test_nalaformer_linear.untrained": _cfg(test=True),
    }
)


@register_model
def nalaformer_xt(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-XT: 6.1M parameters, 79.1% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["xt"], "attn_types": published_types("nala")}
    return build_model(NaLaFormer, "nalaformer_xt", pretrained, **{**model_args, **kwargs})


@register_model
def nalaformer_t(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-T: 15.9M parameters, 82.6% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["t"], "attn_types": published_types("nala")}
    return build_model(NaLaFormer, "nalaformer_t", pretrained, **{**model_args, **kwargs})


@register_model
def nalaformer_s(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-S: 25.7M parameters, 84.3% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["s"], "attn_types": published_types("nala")}
    return build_model(NaLaFormer, "nalaformer_s", pretrained, **{**model_args, **kwargs})


@register_model
def nalaformer_b(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-B: 52.0M parameters, 85.2% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["b"], "attn_types": published_types("nala")}
    return build_model(NaLaFormer, "nalaformer_b", pretrained, **{**model_args, **kwargs})


@register_model
def nalaformer_l(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-L: 95.4M parameters, 85.7% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["l"], "attn_types": published_types("nala")}
    return build_model(NaLaFormer, "nalaformer_l", pretrained, **{**model_args, **kwargs})


@register_model
def nalaformer_xt_linear(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-XT with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["xt"], "attn_types": linear_types("nala")}
    return build_model(NaLaFormer, "nalaformer_xt_linear", pretrained, **{**model_args, **kwargs})


@register_model
def nalaformer_t_linear(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-T with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["t"], "attn_types": linear_types("nala")}
    return build_model(NaLaFormer, "nalaformer_t_linear", pretrained, **{**model_args, **kwargs})


@register_model
def nalaformer_s_linear(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-S with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["s"], "attn_types": linear_types("nala")}
    return build_model(NaLaFormer, "nalaformer_s_linear", pretrained, **{**model_args, **kwargs})


@register_model
def nalaformer_b_linear(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-B with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["b"], "attn_types": linear_types("nala")}
    return build_model(NaLaFormer, "nalaformer_b_linear", pretrained, **{**model_args, **kwargs})


@register_model
def nalaformer_l_linear(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """NaLaFormer-L with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["l"], "attn_types": linear_types("nala")}
    return build_model(NaLaFormer, "nalaformer_l_linear", pretrained, **{**model_args, **kwargs})


@register_model
def test_nalaformer(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """A small NaLaFormer for tests and small data sets."""
    model_args = {**VARIANTS["test"], "attn_types": published_types("nala")}
    return build_model(NaLaFormer, "test_nalaformer", pretrained, **{**model_args, **kwargs})


@register_model
def test_nalaformer_linear(pretrained: bool = False, **kwargs: Any) -> NaLaFormer:
    """`test_nalaformer` with linear attention in all four stages."""
    model_args = {**VARIANTS["test"], "attn_types": linear_types("nala")}
    return build_model(NaLaFormer, "test_nalaformer_linear", pretrained, **{**model_args, **kwargs})
