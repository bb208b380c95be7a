"""timm's models with replaced attentions, under names of their own, for timm's own suite.

Each is small, and built without weights.
"""

# No `from __future__ import annotations`, as in `toyzoo.py`.

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
from timm.models import filter_pretrained_cfg, generate_default_cfgs, register_model
from torch import nn

import vitlinear  # noqa: F401  (registers `replaced_attention`)

__all__: list[str] = []

VIT = {"img_size": 64, "depth": 4, "embed_dim": 96, "num_heads": 4}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24}
SWIN |= {"depths": (1, 2, 1, 1), "num_heads": (1, 2, 3, 6)}


class Replaced(NamedTuple):
    """A model of timm's and what is replaced in it.

    Attributes:
        base: In timm's registry.
        kwargs: Of its constructor.
        attention: In the place of its own.
        more: Arguments of `replace_attention`.
    """

    base: str
    kwargs: dict[str, Any]
    attention: str = "mala"
    more: dict[str, Any] = {}


ZOO: dict[str, Replaced] = {
    "vit": Replaced("test_vit2", {}),
    "vit_gated": Replaced(
        "vit_tiny_patch16_224", {**VIT, "qk_norm": True, "scale_attn_norm": True}, "softmax"
    ),
    "deit": Replaced("deit_tiny_distilled_patch16_224", VIT, "rala"),
    "deit3": Replaced("deit3_small_patch16_224", VIT, "l2", {"blocks": "1:"}),
    "dinov2": Replaced("vit_small_patch14_reg4_dinov2", {**VIT, "patch_size": 16}),
    "clip": Replaced("vit_base_patch32_clip_224", VIT),
    "siglip": Replaced("vit_base_patch16_siglip_224", VIT, "inline"),
    "hybrid": Replaced("vit_tiny_r_s16_p8_224", VIT),
    "eva02": Replaced("eva02_tiny_patch14_224", {**VIT, "patch_size": 16}),
    "dinov3": Replaced("vit_small_patch16_dinov3", VIT),
    "rope": Replaced("vit_small_patch16_rope_224", VIT, "relu"),
    "sapiens2": Replaced("vit_base_patch16_sapiens2", {**VIT, "num_kv_heads": 2}, "polaformer"),
    "beit": Replaced("beit_base_patch16_224", VIT, "mala", {"keep": []}),
    "relpos": Replaced("test_vit_relpos", {"img_size": 64}, "elu", {"keep": ["qk_norm"]}),
    "naflexvit": Replaced(
        "naflexvit_base_patch16_gap", {"depth": 4, "embed_dim": 96, "num_heads": 4}
    ),
    "swin": Replaced("swin_tiny_patch4_window7_224", SWIN, "mala", {"keep": ["mask"]}),
}


def _cfg(replaced: Replaced) -> dict[str, Any]:
    """Configuration of the base, of its small size and without its weights."""
    cfg = timm.get_pretrained_cfg(replaced.base)
    assert cfg is not None
    known: dict[str, Any] = filter_pretrained_cfg(cfg.to_dict(), remove_source=True)
    for key in ("architecture", "tag", "test_input_size", "custom_load"):
        known.pop(key, None)
    before = known["input_size"][1]
    side = 64 if "naflexvit" in replaced.base else replaced.kwargs.get("img_size", before)
    if known.get("pool_size"):
        known["pool_size"] = tuple(-(-cells * side // before) for cells in known["pool_size"])
    return {**known, "input_size": (3, side, side), "num_classes": 1000}


def _entrypoint(name: str, replaced: Replaced) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        overlay = {**_cfg(replaced), **(kwargs.pop("pretrained_cfg_overlay", None) or {})}
        kwargs.pop("pretrained_cfg", None)  # the tag, which the base does not have
        build = timm.model_entrypoint("replaced_attention")
        replacement = {"attention": replaced.attention, **replaced.more}
        return build(
            pretrained,
            base=replaced.base,
            replacements=[replacement],
            pretrained_cfg_overlay=overlay,
            **{**replaced.kwargs, **kwargs},
        )

    create.__name__ = create.__qualname__ = f"test_replaced_{name}"
    return create


default_cfgs = generate_default_cfgs(
    {f"test_replaced_{name}.untrained": _cfg(replaced) for name, replaced in ZOO.items()}
)
for _name, _replaced in ZOO.items():
    globals()[f"test_replaced_{_name}"] = register_model(_entrypoint(_name, _replaced))
