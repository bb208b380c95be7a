"""Small models of timm's families, built without weights, for the tests of replacements."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn


class Small(NamedTuple):
    """A model of timm's, small.

    Attributes:
        name: In timm's registry.
        size: Side of the images.
        kwargs: Of its constructor.
        keep: Parts that stay where it has a table of biases; None for all.
        classes: Of timm's attentions that it has.
    """

    name: str
    size: int
    kwargs: dict[str, Any]
    keep: tuple[str, ...] | None = None
    classes: tuple[str, ...] = ("Attention",)

    def create(self, **kwargs: Any) -> nn.Module:
        """The model in eval mode, with weights that make each part of it matter."""
        model = timm.create_model(self.name, **{**self.kwargs, "num_classes": 7, **kwargs})
        return randomised(model)

    def images(self, batch: int = 2) -> Tensor:
        """Images for it."""
        return torch.randn(batch, 3, self.size, self.size)


def vit(name: str, size: int = 64, depth: int = 3, **kwargs: Any) -> Small:
    """A model that takes a depth, of images of this side."""
    return Small(name, size, {"img_size": size, "depth": depth, **kwargs})


SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "num_heads": (1, 2, 3, 6)}
SWIN["depths"] = (2, 2, 1, 1)
ROTARY = {"classes": ("EvaAttention",)}

FAMILIES: dict[str, Small] = {
    "vit": Small("test_vit", 160, {}),
    "vit, registers": vit("test_vit2"),
    "vit, gated and normed": vit("vit_tiny_patch16_224", qk_norm=True, scale_attn_norm=True),
    "deit, distilled": vit("deit_tiny_distilled_patch16_224"),
    "deit3": vit("deit3_small_patch16_224", embed_dim=96, num_heads=3),
    "dinov2": vit("vit_small_patch14_reg4_dinov2", 56, embed_dim=96, num_heads=3),
    "clip": vit("vit_base_patch32_clip_224", embed_dim=96, num_heads=3),
    "siglip": vit("vit_base_patch16_siglip_224", embed_dim=96, num_heads=3),
    "hybrid": vit("vit_tiny_r_s16_p8_224", embed_dim=96, num_heads=3),
    "eva02": vit("eva02_tiny_patch14_224", 56, embed_dim=96)._replace(**ROTARY),
    "dinov3": vit("vit_small_patch16_dinov3", embed_dim=96, num_heads=3)._replace(**ROTARY),
    "rope, mixed": vit("vit_small_patch16_rope_mixed_224", embed_dim=96, num_heads=3)._replace(
        classes=("AttentionRope",)
    ),
    "sapiens2": vit(
        "vit_base_patch16_sapiens2", embed_dim=96, num_heads=4, num_kv_heads=2
    )._replace(classes=("AttentionRope",)),
    "beit": vit("beit_base_patch16_224", embed_dim=96, num_heads=3)._replace(keep=()),
    "naflexvit": Small(
        "naflexvit_base_patch16_gap", 64, {"depth": 3, "embed_dim": 96, "num_heads": 3}
    ),
    "pit": Small("pit_ti_224", 64, {"img_size": 64}),
    "relpos": vit("test_vit_relpos")._replace(keep=("qk_norm",), classes=("RelPosAttention",)),
    "sam": vit("samvit_base_patch16_224", embed_dim=96, num_heads=2)._replace(keep=()),
    "swin": Small("swin_tiny_patch4_window7_224", 64, SWIN, ("mask",), ("WindowAttention",)),
    "mobilevit": Small("mobilevit_xxs", 64, {}),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model in eval mode whose parameters are random; tables of biases are 0, as without them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scales = parameter.ndim < 2 and "bias" not in name
            parameter.copy_(0.7 * scales + (0.15 if parameter.ndim > 1 else 0.3) * noise)
            if "relative_position_bias" in name or "rel_pos" in name:
                parameter.zero_()
    return model.eval()


def features(model: nn.Module, x: Any) -> Tensor:
    """Features of any of them, by `forward_features`, as one tensor."""
    with torch.no_grad():
        out = model.forward_features(x)
    if isinstance(out, dict):
        return out["patches"]
    return torch.cat([part.flatten() for part in out]) if isinstance(out, tuple) else out
