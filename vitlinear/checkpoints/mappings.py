"""Keys of the released checkpoints, and what they are called here: one row for each layout.

A row says how a layout is recognised and how its keys are renamed. Where the authors used a 1x1
convolution for a linear layer or the other way round, or a [1, C, 1, 1] layer-scale, the numbers
are the same with other axes of length one; the shapes of the model decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Replacement = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class KeyMapping:
    """How the keys of one released layout become ours.

    Attributes:
        name: Of the layout.
        marker: Regular expression that matches a key of this layout, at its beginning, and of no
            other, ours included.
        renames: (pattern, replacement), tried in order at the beginning of a key; the first that
            fits is applied, and no other.
        dropped: Pattern of whole keys that hold nothing that was learned.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, Replacement], ...]
    dropped: str | None = None

    def recognises(self, state_dict: Mapping[str, Tensor]) -> bool:
        """Whether these are keys of this layout."""
        return any(re.match(self.marker, key) for key in state_dict)

    def rename(self, key: str) -> str:
        """Our name of a key; the key itself if no rule fits."""
        for pattern, replacement in self.renames:
            new, count = re.subn(rf"\A(?:{pattern})", replacement, key, count=1)
            if count:
                return new
        return key

    def convert(
        self, state_dict: Mapping[str, Tensor], shapes: Mapping[str, Tensor]
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
            if self.dropped and re.fullmatch(self.dropped, key):
                continue
            new = self.rename(key)
            target = shapes.get(new)
            if (
                target is not None
                and target.shape != value.shape
                and [n for n in target.shape if n > 1] == [n for n in value.shape if n > 1]
            ):
                value = value.reshape(target.shape)
            converted[new] = value
        return converted


def _pyramid_stem(match: re.Match[str]) -> str:
    """Index in the released nn.Sequential of (conv, norm, activation) x 4 -> our layer."""
    layer, part = divmod(int(match[1]), 3)
    return f"stem.conv{layer + 1}.{('conv', 'bn')[part]}."


def _next_stage(match: re.Match[str]) -> str:
    """The authors end a stage with its downsampling; here the next stage begins with it."""
    part = {"reduction": "conv", "norm": "bn"}[match[2]]
    return f"stages.{int(match[1]) + 1}.downsample.{part}."


_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."

# RALA and MALA; NaLaFormer adds a second positional convolution and the norm of its gate.
PYRAMID = KeyMapping(
    name="pyramid",
    marker=r"patch_embed\.proj\.0\.weight$",
    renames=(
        (r"patch_embed\.proj\.(0|1|3|4|6|7|9|10)\.", _pyramid_stem),
        (r"layers\.(\d+)\.downsample\.(reduction|norm)\.", _next_stage),
        (_BLOCK + r"gamma_([12])$", r"stages.\1.blocks.\2.ls\3.gamma"),
        (_BLOCK + r"norm([12])\.norm\.", r"stages.\1.blocks.\2.norm\3."),
        (_BLOCK + r"ffn\.", r"stages.\1.blocks.\2.mlp."),
        (_BLOCK + r"cpe1\.", r"stages.\1.blocks.\2.pos."),
        (_BLOCK + r"cpe2\.", r"stages.\1.blocks.\2.pos2."),
        (_BLOCK + r"attn\.qkvg\.", r"stages.\1.blocks.\2.attn.qkvo."),
        (_BLOCK + r"attn\.out_proj\.", r"stages.\1.blocks.\2.attn.proj."),
        (_BLOCK + r"attn\.ln\.", r"stages.\1.blocks.\2.attn.norm."),
        (_BLOCK, r"stages.\1.blocks.\2."),
        (r"proj\.", "final.conv."),
        (r"norm\.", "final.bn."),
        (r"head\.", "head.fc."),
    ),
    # Recomputed here from the size of the map.
    dropped=r"layers\.\d+\.RoPE\.angle",
)

MAPPINGS: tuple[KeyMapping, ...] = (PYRAMID,)


def find_mapping(state_dict: Mapping[str, Tensor]) -> KeyMapping | None:
    """The layout that these keys have; None for ours, or one that nobody knows."""
    return next((mapping for mapping in MAPPINGS if mapping.recognises(state_dict)), None)
