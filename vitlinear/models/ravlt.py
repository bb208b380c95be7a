"""RAVLT: rank-augmented vision linear transformer.

`Breaking the Low-Rank Dilemma of Linear Attention` (RALA, CVPR 2025)
- paper: https://arxiv.org/abs/2411.07635
- code and weights by the authors: https://github.com/qhfan/RALA,
  https://huggingface.co/aldjalkdf/RAVLT

Written from the definition. Published models attend with RALA in stages 1 and 2 and with softmax in
stages 3 and 4; `ravlt_*_linear` attend with RALA in all four and share no published weights.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from ..checkpoints.published import pretrained_source
from ._build import build_model
from ._pyramid import LinearPyramid

__all__ = ["RAVLT"]


class RAVLT(LinearPyramid):
    """The pyramid with rank-augmented linear attention; arguments as `LinearPyramid`."""


PUBLISHED = ("rala", "rala", "softmax", "softmax")
LINEAR = ("rala", "rala", "rala", "rala")

# Source: released code, classfication/RALA.py.
VARIANTS: dict[str, dict[str, Any]] = {
    "t": {
        "embed_dims": (64, 128, 256, 512),
        "depths": (2, 2, 6, 2),
        "num_heads": (1, 2, 4, 8),
        "ls_init_values": (1.0, 1.0, 1.0, 1.0),
    },
    "s": {
        "embed_dims": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "num_heads": (1, 2, 5, 8),
        "ls_init_values": (1.0, 1.0, 1.0, 1.0),
    },
    "b": {
        "embed_dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "ls_init_values": (1.0, 1.0, 1e-6, 1e-6),
    },
    "l": {
        "embed_dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "ls_init_values": (1e-6, 1e-6, 1e-6, 1e-6),
    },
    # Ours, for tests and small data sets.
    "test": {
        "embed_dims": (24, 48, 64, 96),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 3),
        "mlp_ratios": (3.0, 3.0, 3.0, 3.0),
        "head_width": 192,
    },
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        # Evaluation as published: resize to 256, centre crop of 224, bicubic.
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2411.07635",
        "paper_name": "Breaking the Low-Rank Dilemma of Linear Attention",
        "origin_url": "https://github.com/qhfan/RALA",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"ravlt_{x}.in1k": _cfg(**pretrained_source(f"ravlt_{x}")) for x in "tsbl"},
        **{f"ravlt_{x}_linear.untrained": _cfg() for x in "tsbl"},
        "test_ravlt.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
        "test_ravlt_linear.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


def _create_ravlt(name: str, pretrained: bool, **kwargs: Any) -> RAVLT:
    return build_model(
        RAVLT,
        name,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def ravlt_t(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-T: 14.9M parameters, 82.8% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["t"], "attn_types": PUBLISHED}
    return _create_ravlt("ravlt_t", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_s(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-S: 25.6M parameters, 84.4% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["s"], "attn_types": PUBLISHED}
    return _create_ravlt("ravlt_s", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_b(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-B: 48.2M parameters, 85.5% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["b"], "attn_types": PUBLISHED}
    return _create_ravlt("ravlt_b", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_l(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-L: 95.2M parameters, 85.8% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["l"], "attn_types": PUBLISHED}
    return _create_ravlt("ravlt_l", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_t_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-T with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["t"], "attn_types": LINEAR}
    return _create_ravlt("ravlt_t_linear", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_s_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-S with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["s"], "attn_types": LINEAR}
    return _create_ravlt("ravlt_s_linear", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_b_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-B with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["b"], "attn_types": LINEAR}
    return _create_ravlt("ravlt_b_linear", pretrained, **{**model_args, **kwargs})


@register_model
def ravlt_l_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-L with linear attention in all four stages; not a published model."""
    model_args = {**VARIANTS["l"], "attn_types": LINEAR}
    return _create_ravlt("ravlt_l_linear", pretrained, **{**model_args, **kwargs})


@register_model
def test_ravlt(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """A small RAVLT for tests and small data sets."""
    model_args = {**VARIANTS["test"], "attn_types": PUBLISHED}
    return _create_ravlt("test_ravlt", pretrained, **{**model_args, **kwargs})


@register_model
def test_ravlt_linear(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """`test_ravlt` with linear attention in all four stages."""
    model_args = {**VARIANTS["test"], "attn_types": LINEAR}
    return _create_ravlt("test_ravlt_linear", pretrained, **{**model_args, **kwargs})
