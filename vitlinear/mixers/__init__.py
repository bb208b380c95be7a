"""Attentions by name: what mixes values between the projections of a layer, and the layer.

Each file below that holds mixers registers them when it is imported here.
"""

from . import families as families
from .attention import MixerAttention, attention_of_spec, create_attention
from .description import AttentionDescription, Option
from .gated import GatedMixerAttention
from .grid import Grid
from .mixer import Mixer
from .registry import (
    AttentionSpec,
    describe_attention,
    find_mixer,
    list_attentions,
    make_mixer,
    register,
    split_spec,
)

__all__ = [
    "AttentionDescription",
    "AttentionSpec",
    "GatedMixerAttention",
    "Grid",
    "Mixer",
    "MixerAttention",
    "Option",
    "attention_of_spec",
    "create_attention",
    "describe_attention",
    "find_mixer",
    "list_attentions",
    "make_mixer",
    "register",
    "split_spec",
]
