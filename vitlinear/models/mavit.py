"""MAViT: magnitude-aware vision transformer.

Magnitude-aware linear attention (MALA, ICCV 2025)
- paper: https://arxiv.org/abs/2507.00698
- code and weights by the authors: https://github.com/qhfan/MALA,
  https://huggingface.co/aldjalkdf/MAViT

Written from the definition. Published models attend with MALA in stages 1 and 2 and with softmax in
stages 3 and 4; `mavit_*_linear` attend with MALA in all four and share no published weights.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from vitlinear.facts import pretrained_source

from ._build import build_model
from ._pyramid import SIZES, LinearPyramid, linear_types, published_types, pyramid_cfg

__all__ = ["MAViT"]


class MAViT(LinearPyramid):
    """The pyramid with magnitude-aware linear attention; arguments as `LinearPyramid`."""


# Source: released code, classfication_release/model.py; dimensions and depths are RALA's.
VARIANTS: dict[str, dict[str, Any]] = {
    "t": {**SIZES["t"], "head_width": 2048},
    "s": {**SIZES["s"], "head_width": 2048},
    "b": {**SIZES["b"], "head_width": 2048},
    "l": {**SIZES["l"], "head_width": 2560},
    "test": SIZES["test"],
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return pyramid_cfg(
        paper_ids="arXiv:2507.00698",
        paper_name="Rectifying Magnitude Neglect in Linear Attention",
        origin_url="https://github.com/qhfan/MALA",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        **{f"mavit_{size}.in1k": _cfg(**pretrained_source(f"mavit_{size}")) for size in "tsbl"},
        **{f"mavit_{size}_linear.untrained": _cfg() for size in "tsbl"},
        "test_mavit.untrained": _cfg(test=True),
        "test_mavit_linear.untrained": _cfg(test=True),
    }
)


@register_model
def mavit_t(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-T: 16.4M parameters; 82.9% ImageNet-1K top-1 according to secondary sources."""
    model_args = {**VARIANTS["t"], "attn_types": published_types("mala")}
    return build_model(MAViT, "mavit_t", pretrained, **{**model_args, **kwargs})


@register_model
def mavit_s(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-S: 27.1M parameters; 84.7% ImageNet-1K top-1 according to secondary sources."""
    model_args = {**VARIANTS["s"], "attn_types": published_types("mala")}
    return build_model(MAViT, "mavit_s", pretrained, **{**model_args, **kwargs})


@register_model
def mavit_b(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-B: 49.8M parameters; 85.7% ImageNet-1K top-1 according to secondary sources."""
    model_args = {**VARIANTS["b"], "attn_types": published_types("mala")}
    return build_model(MAViT, "mavit_b", pretrained, **{**model_args, **kwargs})


@register_model
def mavit_l(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-L: 97.8M parameters; 86.0% ImageNet-1K top-1 according to secondary sources."""
    model_args = {**VARIANTS["l"], "attn_types": published_types("mala")}
    return build_model(MAViT, "mavit_l", pretrained, **{**model_args, **kwargs})


@register_model
def mavit_t_linear(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-T with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["t"], "attn_types": linear_types("mala")}
    return build_model(MAViT, "mavit_t_linear", pretrained, **{**model_args, **kwargs})


@register_model
def mavit_s_linear(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-S with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["s"], "attn_types": linear_types("mala")}
    return build_model(MAViT, "mavit_s_linear", pretrained, **{**model_args, **kwargs})


@register_model
def mavit_b_linear(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-B with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["b"], "attn_types": linear_types("mala")}
    return build_model(MAViT, "mavit_b_linear", pretrained, **{**model_args, **kwargs})


@register_model
def mavit_l_linear(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-L with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["l"], "attn_types": linear_types("mala")}
    return build_model(MAViT, "mavit_l_linear", pretrained, **{**model_args, **kwargs})


@register_model
def test_mavit(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """A small MAViT for tests and small data sets."""
    model_args = {**VARIANTS["test"], "attn_types": published_types("mala")}
    return build_model(MAViT, "test_mavit", pretrained, **{**model_args, **kwargs})


@register_model
def test_mavit_linear(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """`test_mavit` with linear attention in all four stages."""
    model_args = {**VARIANTS["test"], "attn_types": linear_types("mala")}
    return build_model(MAViT, "test_mavit_linear", pretrained, **{**model_args, **kwargs})
