"""Keys of the released checkpoints, and what they are called here: one row for each layout.

A row says how a layout is recognised and how its keys are renamed. Where the authors used a 1x1
convolution for a linear layer or the other way round, or a [1, C, 1, 1] layer-scale, the numbers
are the same with other axes of length one; the shapes of the model decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Replacement = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class KeyMapping:
    """A released layout, and how its keys become ours.

    Attributes:
        name: Of the layout.
        marker: Regular expression that matches a key of this layout, at its beginning, and of no
            other, ours included.
        renames: (pattern, replacement), tried in order at the beginning of a key; the first that
            fits is applied, and no other.
        dropped: Pattern of whole keys that hold nothing that was learned.
        stacked: Layers of the authors that are one here: (part of the key, of which in order),
            before renaming.
        order: Places in which the equal parts of what was stacked stand here, if in others.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, Replacement], ...]
    dropped: str | None = None
    stacked: tuple[str, tuple[str, ...]] | None = None
    order: tuple[int, ...] | None = None

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

    def stack(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join what stands in several layers of the authors and in one of ours."""
        joined = dict(state_dict)
        if self.stacked is None:
            return joined
        whole, parts = self.stacked
        for key in state_dict:
            keys = [key.replace(parts[0], part) for part in parts]
            if parts[0] in key and all(k in joined for k in keys):
                value = torch.cat([joined.pop(k) for k in keys])
                if self.order is not None:
                    pieces = value.chunk(len(self.order))
                    value = torch.cat([pieces[i] for i in self.order])
                joined[key.replace(parts[0], whole)] = value
        return joined

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
        for key, value in self.stack(state_dict).items():
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


def _conv_stem(match: re.Match[str]) -> str:
    """Index in a released nn.Sequential of conv, norm, activation, conv, ... -> our layer."""
    layer, part = divmod(int(match[1]), 3)
    return f"stem.conv{layer + 1}.{('conv', 'bn')[part]}."


def _next_stage(match: re.Match[str]) -> str:
    """The authors end a stage with its downsampling; here the next stage begins with it."""
    part = {"reduction": "conv", "norm": "bn"}[match[2]]
    return f"stages.{int(match[1]) + 1}.downsample.{part}."


def _l2vit_position(match: re.Match[str]) -> str:
    """The authors count the positional convolutions of a block from 0."""
    return f"stages.{match[1]}.blocks.{match[2]}.pos{int(match[3]) + 1}."


_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."

# RALA and MALA; NaLaFormer adds a second positional convolution and the norm of its gate.
PYRAMID = KeyMapping(
    name="pyramid",
    marker=r"patch_embed\.proj\.0\.weight$",
    renames=(
        (r"patch_embed\.proj\.(0|1|3|4|6|7|9|10)\.", _conv_stem),
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


def _mila_stem(match: re.Match[str]) -> str:
    """Convolutions 2 and 3 of the authors are two each; ours count on."""
    layer = {"1": 1, "2.0": 2, "2.1": 3, "3.0": 4, "3.1": 5}[match[1]]
    return f"stem.conv{layer}.{_CONV_NORM[match[2]]}."


def _inverted_downsample(match: re.Match[str]) -> str:
    """As `_next_stage`, for `InvertedDownsample`, of which only the last part has a norm."""
    layer = f"stages.{int(match[1]) + 1}.downsample.conv{int(match[2]) + 1}."
    return f"{layer}{_CONV_NORM[match[3]]}." if match[2] == "2" else layer


_CONV_NORM = {"conv": "conv", "norm": "bn"}
INVERTED_DOWNSAMPLE = (
    r"layers\.(\d+)\.downsample\.conv\.([012])\.(conv|norm)\.",
    _inverted_downsample,
)

MILA = KeyMapping(
    name="mila",
    marker=r"layers\.\d+\.blocks\.\d+\.act_proj\.",
    renames=(
        (r"patch_embed\.conv(1|[23]\.[01])\.(conv|norm)\.", _mila_stem),
        INVERTED_DOWNSAMPLE,
        (_BLOCK + r"cpe([12])\.", r"stages.\1.blocks.\2.pos\3."),
        (_BLOCK + r"in_proj\.", r"stages.\1.blocks.\2.attn.in_proj."),
        (_BLOCK + r"act_proj\.", r"stages.\1.blocks.\2.attn.gate_proj."),
        (_BLOCK + r"dwc\.", r"stages.\1.blocks.\2.attn.dwconv."),
        (_BLOCK + r"attn\.(qk|lepe)\.", r"stages.\1.blocks.\2.attn.attend.\3."),
        (_BLOCK + r"out_proj\.", r"stages.\1.blocks.\2.attn.proj."),
        (_BLOCK, r"stages.\1.blocks.\2."),
        (r"norm\.", "final."),
        (r"head\.", "head.fc."),
    ),
    # Made here for the size of the map.
    dropped=r".*\.rotations",
)

_L2_BLOCK = r"stages\.(\d+)\.(\d+)\."

L2VIT = KeyMapping(
    name="l2vit",
    marker=r"downsample_layers\.",
    renames=(
        (r"downsample_layers\.0\.proj\.proj\.([0134])\.", _conv_stem),
        (r"downsample_layers\.0\.norm\.", "stem.norm."),
        (r"downsample_layers\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
        (r"downsample_layers\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
        (_L2_BLOCK + r"cpe\.([01])\.proj\.", _l2vit_position),
        (_L2_BLOCK + r"local_mp\.", r"stages.\1.blocks.\2.lcm."),
        (_L2_BLOCK, r"stages.\1.blocks.\2."),
        (r"norm\.", "final."),
        (r"head\.", "head.fc."),
    ),
)


def _pvt_place(match: re.Match[str]) -> str:
    """Patch embeddings and positions are counted from 1 and the first is our stem."""
    part = {"proj": "conv.", "norm": "norm."}.get(match["part"] or "", "pos_embed")
    place = "stem" if match["i"] == "1" else f"stages.{int(match['i']) - 1}.downsample"
    return f"{place}.{part}"


def _counted_from_one(replacement: str) -> Callable[[re.Match[str]], str]:
    """A replacement whose group 1 is the number of a stage from 1."""

    def replace(match: re.Match[str]) -> str:
        return f"stages.{int(match[1]) - 1}." + match.expand(replacement)

    return replace


def _next_merging(match: re.Match[str]) -> str:
    """As `_next_stage`."""
    return f"stages.{int(match[1]) + 1}.downsample."


_PVT_BLOCK = r"block(\d)\.(\d+)\."
_PVT_EMBEDDING: tuple[tuple[str, Replacement], ...] = (
    (r"patch_embed(?P<i>\d)\.(?P<part>proj|norm)\.", _pvt_place),
    (r"pos_embed(?P<i>\d)(?P<part>)$", _pvt_place),
)

INLINE_PVT = KeyMapping(
    name="inline-pvt",
    marker=_PVT_BLOCK + r"attn\.residual\.",
    renames=(
        *_PVT_EMBEDDING,
        (
            _PVT_BLOCK + r"attn\.residual\.0\.",
            _counted_from_one(r"blocks.\2.attn.attend.local.fc1."),
        ),
        (
            _PVT_BLOCK + r"attn\.residual\.2\.",
            _counted_from_one(r"blocks.\2.attn.attend.local.fc2."),
        ),
        (_PVT_BLOCK, _counted_from_one(r"blocks.\2.")),
        (r"head\.", "head.fc."),
    ),
    stacked=(".attn.qkv.", (".attn.q.", ".attn.kv.")),
)

POLA_PVT = KeyMapping(
    name="pola-pvt",
    marker=_PVT_BLOCK + r"attn\.qg\.",
    renames=(
        *_PVT_EMBEDDING,
        (_PVT_BLOCK + r"attn\.dwc\.", _counted_from_one(r"blocks.\2.attn.attend.lepe.")),
        (_PVT_BLOCK + r"attn\.power$", _counted_from_one(r"blocks.\2.attn.attend.power")),
        (_PVT_BLOCK, _counted_from_one(r"blocks.\2.")),
        (r"norm\.", "final."),
        (r"head\.", "head.fc."),
    ),
    stacked=(".attn.qkvg.", (".attn.qg.", ".attn.kv.")),
    order=(0, 2, 3, 1),
)

_SWIN: tuple[tuple[str, Replacement], ...] = (
    (r"patch_embed\.proj\.", "stem.conv."),
    (r"patch_embed\.norm\.", "stem.norm."),
    (r"layers\.(\d+)\.downsample\.", _next_merging),
    (_BLOCK + r"attn\.relative_", r"stages.\1.blocks.\2.attn.rel_pos.relative_"),
    (_BLOCK, r"stages.\1.blocks.\2."),
    (r"norm\.", "final."),
    (r"head\.", "head.fc."),
)
# Made here from the size of the window and of the map.
_SWIN_DROPPED = r".*\.(relative_position_index|attn_mask)"

INLINE_SWIN = KeyMapping(
    name="inline-swin",
    marker=r"layers\.\d+\.blocks\.\d+\.attn\.residual\.",
    renames=(
        (_BLOCK + r"attn\.residual\.0\.", r"stages.\1.blocks.\2.attn.attend.local.fc1."),
        (_BLOCK + r"attn\.residual\.2\.", r"stages.\1.blocks.\2.attn.attend.local.fc2."),
        *_SWIN,
    ),
    dropped=_SWIN_DROPPED,
)

POLA_SWIN = KeyMapping(
    name="pola-swin",
    marker=r"layers\.\d+\.blocks\.\d+\.attn\.positional_encoding$",
    renames=(
        (_BLOCK + r"attn\.dwc\.", r"stages.\1.blocks.\2.attn.attend.lepe."),
        (_BLOCK + r"attn\.power$", r"stages.\1.blocks.\2.attn.attend.power"),
        *_SWIN,
    ),
    dropped=_SWIN_DROPPED,
)

INLINE_DEIT = KeyMapping(
    name="inline-deit",
    marker=r"blocks\.\d+\.attn\.residual\.",
    renames=(
        (r"(blocks\.\d+\.attn\.)residual\.0\.", r"\1attend.local.fc1."),
        (r"(blocks\.\d+\.attn\.)residual\.2\.", r"\1attend.local.fc2."),
    ),
)

_CSWIN_BLOCK = r"stage(\d)\.(\d+)\."
_CSWIN_BRANCH = _CSWIN_BLOCK + r"attns\.(\d)\."

INLINE_CSWIN = KeyMapping(
    name="inline-cswin",
    marker=r"stage1_conv_embed\.",
    renames=(
        (r"stage1_conv_embed\.0\.", "stem.conv."),
        (r"stage1_conv_embed\.2\.", "stem.norm."),
        (r"merge(\d)\.", r"stages.\1.downsample."),
        (_CSWIN_BRANCH + r"get_v\.", _counted_from_one(r"blocks.\2.attn.branches.\3.lepe.")),
        (
            _CSWIN_BRANCH + r"residual\.0\.",
            _counted_from_one(r"blocks.\2.attn.branches.\3.attend.local.fc1."),
        ),
        (
            _CSWIN_BRANCH + r"residual\.2\.",
            _counted_from_one(r"blocks.\2.attn.branches.\3.attend.local.fc2."),
        ),
        (_CSWIN_BLOCK + r"(qkv|proj)\.", _counted_from_one(r"blocks.\2.attn.\3.")),
        (_CSWIN_BLOCK, _counted_from_one(r"blocks.\2.")),
        (r"norm\.", "final."),
        (r"head\.", "head.fc."),
    ),
)


def _h_vittt_stem(match: re.Match[str]) -> str:
    """The authors count the convolutions of the stem from 0."""
    return f"stem.conv{int(match[1]) + 1}.{_CONV_NORM[match[2]]}."


H_VITTT = KeyMapping(
    name="h-vittt",
    marker=r"layers\.\d+\.blocks\.\d+\.attn\.w3$",
    renames=(
        (r"patch_embed\.conv\.(\d)\.(conv|norm)\.", _h_vittt_stem),
        INVERTED_DOWNSAMPLE,
        (_BLOCK + r"cpe\.", r"stages.\1.blocks.\2.pos."),
        (_BLOCK + r"mlp\.dwc\.", r"stages.\1.blocks.\2.mlp.dwconv."),
        (_BLOCK, r"stages.\1.blocks.\2."),
        (r"norm\.", "final."),
        (r"head\.", "head.fc."),
    ),
    # Made here for the size of the map. Detectors have others, which are never used.
    dropped=r".*\.rotations",
)

VITTT = KeyMapping(
    name="vittt",
    marker=r"blocks\.\d+\.cpe\.",
    renames=((r"(blocks\.\d+\.)cpe\.", r"\1pos."),),
)

MAPPINGS: tuple[KeyMapping, ...] = (
    PYRAMID,
    L2VIT,
    MILA,
    INLINE_DEIT,
    INLINE_PVT,
    INLINE_SWIN,
    INLINE_CSWIN,
    H_VITTT,
    VITTT,
    POLA_PVT,
    POLA_SWIN,
)


def find_mapping(state_dict: Mapping[str, Tensor]) -> KeyMapping | None:
    """The layout that these keys have; None for ours, or one that nobody knows."""
    return next((mapping for mapping in MAPPINGS if mapping.recognises(state_dict)), None)
