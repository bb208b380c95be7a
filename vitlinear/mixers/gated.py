"""The layer of the pyramids around a mixer: convolution of the values and output multiplier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.layers.attention.scriptable import unpack
from vitlinear.layers.band import BANDED
from vitlinear.layers.conv.depthwise_conv import DepthwiseConv
from vitlinear.layers.layout import split_axis
from vitlinear.layers.linear import Linear
from vitlinear.layers.padding_rule import MASK
from vitlinear.ops import RotaryTables

from .attention import mixed
from .grid import Grid
from .mixer import Mixer


# One step to torch.fx, which cannot follow choices that look at shapes.
@register_notrace_module
class GatedMixerAttention(nn.Module):
    """proj((mixer(q, k, v) + dw5(v)) * o) with q, k, v, o from one projection of the input.

    What `vitlinear.layers.GatedAttention` is around the operator, with parameters of its names; or
    with a norm, proj(LN(mixer(q, k, v) + dw5(v)) * SiLU(o)), `NormGatedAttention`.
    """

    padding_rule = MASK
    row_rule = BANDED

    def __init__(
        self,
        mixer: Mixer,
        norm: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Put the layer together.

        Args:
            mixer: Attention between the projections.
            norm: Whether a norm and SiLU(o) stand where o does.
            proj_drop: Dropout rate of the output.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = mixer.dim
        self.num_heads = mixer.num_heads
        self.head_dim = mixer.head_dim
        self.qkvo = Linear(dim, 4 * dim, **dd)
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.mixer = mixer
        self.norm = LayerNorm(dim, eps=1e-5, **dd) if norm else None
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, rotary: RotaryTables | None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend over the whole map.

        Args:
            x: [B, H, W, C].
            rotary: Position tables of the map, of the kind that the mixer takes; None for none.
            key_padding_mask: [B, H, W] bool, True for padding: equal to a map without it.

        Returns:
            [B, H, W, C].
        """
        height, width = x.shape[1], x.shape[2]
        mask = None
        if key_padding_mask is not None:
            x = x.masked_fill(key_padding_mask.unsqueeze(-1), 0)
            mask = key_padding_mask.flatten(1)
        tokens = x.flatten(1, 2)
        heads = [self.num_heads, self.head_dim]
        q, k, v, o, values = unpack(split_axis(self.qkvo(tokens), 2, [4, *heads]))
        values = split_axis(values.flatten(2), 1, [height, width])
        if key_padding_mask is not None:
            values = values.masked_fill(key_padding_mask.unsqueeze(-1), 0)
        lepe = self.lepe(values).flatten(1, 2)
        grid = Grid(height, width, 0, rotary, mask)
        out = mixed(self.mixer, q, k, v, grid, tokens).flatten(2) + lepe
        gate = o.flatten(2)
        out = out * gate if self.norm is None else self.norm(out) * F.silu(gate)
        if mask is not None:
            out = out.masked_fill(mask.unsqueeze(-1), 0)
        return self.proj_drop(split_axis(self.proj(out), 1, [height, width]))
