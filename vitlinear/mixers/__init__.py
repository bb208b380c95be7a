"""Attentions by name: what mixes values between the projections of a layer, and the layer.

Each file below that holds mixers registers them when it is imported here.
"""

from . import agent as agent
from . import delta as delta
from . import families as families
from . import flowformer as flowformer
from . import focused as focused
from . import hedgehog as hedgehog
from . import lawcat as lawcat
from . import linfusion as linfusion
from . import lla as lla
from . import lolcats as lolcats
from . import mhla as mhla
from . import nats as nats
from . import routing as routing
from . import saga as saga
from . import sea as sea
from . import still as still
from . import taylor as taylor
from . import titans as titans
from . import transnormer as transnormer
from . import vssd as vssd
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
