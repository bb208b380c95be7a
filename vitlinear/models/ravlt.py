"""RAVLT: rank-augmented vision linear transformer.

`Breaking the Low-Rank Dilemma of Linear Attention` (RALA, CVPR 2025)
- paper: https://arxiv.org/abs/2411.07635
- code and weights by the authors: https://github.com/qhfan/RALA,
  https://huggingface.co/aldjalkdf/RAVLT

Written from the definition. Published models attend with RALA in stages 1 and 2 and with softmax in
stages 3 and 4; `ravlt_*_linear` attend with RALA in all four and share no published weights.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from vitlinear.facts import pretrained_source

from ._build import build_model
from ._pyramid import SIZES, LinearPyramid, linear_types, published_types, pyramid_cfg

__all__ = ["RAVLT"]


class RAVLT(LinearPyramid):
    """The pyramid with rank-augmented linear attention; arguments as `LinearPyramid`."""


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return pyramid_cfg(
        paper_ids="arXiv:2411.07635",
        paper_name="Breaking the Low-Rank Dilemma of Linear Attention",
        origin_url="https://github.com/qhfan/RALA",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        **{f"ravlt_{size}.in1k": _cfg(**pretrained_source(f"ravlt_{size}")) for size in "tsbl"},
        **{f"ravlt_{size}_linear.untrained": _cfg() for size in "tsbl"},
        "test_ravlt.untrained": _cfg(test=True),
        "test_ravlt_linear.untrained": _cfg(test=True),
    }
)


@register_model
def ravlt_t(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-T: 14.9M parameters, 82.8% ImageNet-1K top-1 as published."""
    model_args = {**SIZES["t"], "attn_types": published_types("rala")}
    return build_model(RAVLT, "ravlt_t", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_s(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-S: 25.6M parameters, 84.4% ImageNet-1K top-1 as published."""
    model_args = {**SIZES["s"], "attn_types": published_types("rala")}
    return build_model(RAVLT, "ravlt_s", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_b(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-B: 48.2M parameters, 85.5% ImageNet-1K top-1 as published."""
    model_args = {**SIZES["b"], "attn_types": published_types("rala")}
    return build_model(RAVLT, "ravlt_b", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_l(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-L: 95.2M parameters, 85.8% ImageNet-1K top-1 as published."""
    model_args = {**SIZES["l"], "attn_types": published_types("rala")}
    return build_model(RAVLT, "ravlt_l", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_t_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-T with linear attention in all four stages; not a published model."""
    model_args = {**SIZES["t"], "attn_types": linear_types("rala")}
    return build_model(RAVLT, "ravlt_t_linear", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_s_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-S with linear attention in all four stages; not a published model."""
    model_args = {**SIZES["s"], "attn_types": linear_types("rala")}
    return build_model(RAVLT, "ravlt_s_linear", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_b_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-B with linear attention in all four stages; not a published model."""
    model_args = {**SIZES["b"], "attn_types": linear_types("rala")}
    return build_model(RAVLT, "ravlt_b_linear", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_l_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-L with linear attention in all four stages; not a published model."""
    model_args = {**SIZES["l"], "attn_types": linear_types("rala")}
    return build_model(RAVLT, "ravlt_l_linear", pretrained, **{**model_args, **kwargs})


@register_model
def test_ravlt(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """A small RAVLT for tests and small data sets."""
    model_args = {**SIZES["test"], "attn_types": published_types("rala")}
    return build_model(RAVLT, "test_ravlt", pretrained, **{**model_args, **kwargs})


@register_model
def test_ravlt_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """`test_ravlt` with linear attention in all four stages."""
    model_args = {**SIZES["test"], "attn_types": linear_types("rala")}
    return build_model(RAVLT, "test_ravlt_linear", pretrained, **{**model_args, **kwargs})
