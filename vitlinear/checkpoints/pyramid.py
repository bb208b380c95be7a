"""Keys of the released RALA checkpoints, and what they are called here.

MALA's are the same; other families on the pyramid add their names to the table. Where the authors
used a 1x1 convolution for a linear layer, or a [1, C, 1, 1] layer-scale, the weight loses its
spatial axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# Stem: index in the released nn.Sequential of conv, norm, activation -> layer here.
_STEM = {
    str(3 * layer + index): f"conv{layer + 1}.{part}"
    for layer in range(4)
    for index, part in enumerate(("conv", "bn"))
}

_RENAMES = (
    (r"^layers\.(\d+)\.blocks\.(\d+)\.gamma_([12])$", r"stages.\1.blocks.\2.ls\3.gamma"),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.norm([12])\.norm\.", r"stages.\1.blocks.\2.norm\3."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.ffn\.", r"stages.\1.blocks.\2.mlp."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^proj\.", "final_conv.conv."),
    (r"^norm\.", "final_conv.bn."),
    (r"^head\.", "head.fc."),
)

# Recomputed here from the size of the map; the buffer holds nothing that was learned.
_DROPPED = re.compile(r"^layers\.\d+\.RoPE\.angle$")

_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.(reduction|norm)\.")


def is_upstream_pyramid(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of the authors' release."""
    return "patch_embed.proj.0.weight" in state_dict


def _rename(key: str) -> str:
    match = re.match(r"^patch_embed\.proj\.(\d+)\.(.*)$", key)
    if match and match[1] in _STEM:
        return f"stem.{_STEM[match[1]]}.{match[2]}"
    if match := _DOWNSAMPLE.match(key):
        # The authors end a stage with its downsampling; here the next stage begins with it, so
        # that the output of a stage is its feature map.
        part = "conv" if match[2] == "reduction" else "bn"
        return f"stages.{int(match[1]) + 1}.downsample.{part}.{key[match.end() :]}"
    for pattern, replacement in _RENAMES:
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    return key


def convert_pyramid(
    state_dict: Mapping[str, Tensor], shapes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Translate a released state dict.

    Args:
        state_dict: The authors' keys, from `unwrap_state_dict`.
        shapes: State dict of the model to load into; gives the shapes.

    Returns:
        Our keys. Keys that are not understood are passed on under their own name and values of
        another size as they are, so that `load_state_dict` reports them.
    """
    converted = {}
    for key, value in state_dict.items():
        if _DROPPED.match(key):
            continue
        new = _rename(key)
        target = shapes.get(new)
        # 1x1 convolution -> linear layer, [1, C, 1, 1] -> [C], and a linear layer -> 1x1
        # convolution: the same numbers with other axes of length one.
        if (
            target is not None
            and target.shape != value.shape
            and [n for n in target.shape if n > 1] == [n for n in value.shape if n > 1]
        ):
            value = value.reshape(target.shape)
        converted[new] = value
    return converted
