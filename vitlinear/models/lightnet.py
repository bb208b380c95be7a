"""LightNet: linear attention in one pass, with positions for several axes.

`You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet`
- paper: https://arxiv.org/abs/2405.21022

**No vision code or weights of the authors are public, and no published accuracy belongs to these
models.** What is built here follows the paper's description: MD-TPE once after the patches, then
blocks of LightNet attention, with MD-LRPE on queries and keys, and a GLU. Inferred are, from the
modules for language that the authors have published or from what image models of this kind have:
the sizes, patches of 16, pooling over all tokens, the causal direction of MD-TPE, the frequencies
of MD-LRPE, and the order of norm and gate in the attention.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vitlinear.layers import LightNetAttention, MdTpe, RmsNorm, SwiGlu

from ._build import build_model
from ._isotropic import IsotropicBackbone, token_cfg

__all__ = ["LightNet"]


class LightNet(IsotropicBackbone):
    """Backbone and classifier; takes images of any size, square or not."""

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 2.0,
        bidirectional: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model.

        Args:
            patch_size: Side of a patch in pixels.
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: ``'avg'``, ``'max'``, ``'avgmax'``, or ``''`` for the logits of every
                token.
            embed_dim: Channels.
            depth: Blocks.
            num_heads: Heads of attention and of MD-TPE.
            mlp_ratio: Hidden width of the GLUs over the channels.
            bidirectional: Let MD-TPE see both sides of a token; see `AxisTpe`.
            drop_rate: Dropout rate before the classifier.
            pos_drop_rate: Dropout rate of the tokens before the first block.
            proj_drop_rate: Dropout rate of the output of attentions and GLUs.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            attn_backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: A number is too small, or the channels do not divide into heads.
            AssertionError: The pooling is not supported.
        """
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            None,
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            embed_dim,
            depth,
            class_token=False,
            learned_positions=False,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            **dd,
        )
        self.position = MdTpe(embed_dim, num_heads, bidirectional, **dd)

        def attn() -> nn.Module:
            return LightNetAttention(
                embed_dim, num_heads, proj_drop=proj_drop_rate, backend=attn_backend, **dd
            )

        def mlp() -> nn.Module:
            return SwiGlu(embed_dim, int(embed_dim * mlp_ratio), proj_drop_rate, **dd)

        self.make_blocks(attn, mlp, RmsNorm, drop_path_rate, **dd)


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
    # Ours, for tests and small data sets.
    "test": {"embed_dim": 64, "num_heads": 2, "depth": 4},
}


def _cfg(side: int = 224) -> dict[str, Any]:
    return token_cfg(
        side,
        paper_ids="arXiv:2405.21022",
        paper_name="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with "
        "LightNet",
    )


default_cfgs = generate_default_cfgs(
    {
        "lightnet_tiny.untrained": _cfg(),
        "lightnet_small.untrained": _cfg(),
        "lightnet_base.untrained": _cfg(),
        "test_lightnet.untrained": _cfg(96),
    }
)


@register_model
def lightnet_tiny(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """LightNet of width 192; not a published model."""
    return build_model(LightNet, "lightnet_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def lightnet_small(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """LightNet of width 384; not a published model."""
    return build_model(LightNet, "lightnet_small", pretrained, **{**VARIANTS["small"], **kwargs})


@register_model
def lightnet_base(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """LightNet of width 768; not a published model."""
    return build_model(LightNet, "lightnet_base", pretrained, **{**VARIANTS["base"], **kwargs})


@register_model
def test_lightnet(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """A small LightNet for tests and small data sets."""
    return build_model(LightNet, "test_lightnet", pretrained, **{**VARIANTS["test"], **kwargs})
