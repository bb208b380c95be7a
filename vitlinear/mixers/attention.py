"""The layer around a mixer: projections, norms of queries and keys, positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.layers.attention.scriptable import unpack
from vitlinear.layers.band import BANDED
from vitlinear.layers.layout import split_axis
from vitlinear.layers.linear import Linear
from vitlinear.layers.padding_rule import MASK
from vitlinear.layers.positions.map_rotary import of_band, rows_of_map
from vitlinear.layers.rms_norm import RmsNorm
from vitlinear.ops import (
    RotaryTables,
    accumulation_dtype,
    full_width_rotary_tables,
    lrpe_tables,
    rotary_tables,
)

from .grid import Grid
from .mixer import Mixer
from .registry import AttentionSpec, make_mixer, split_spec


def position_tables(mixer: Mixer, height: int, width: int, like: Tensor) -> RotaryTables:
    """Position tables of a map for a mixer, of the kind that it takes.

    Args:
        mixer: The mixer.
        height: Rows of the map, or of the band of it that is seen.
        width: Columns of the map.
        like: Has the device, and the type whose sums the tables are for.

    Raises:
        ValueError: The channels of a head do not divide as the tables ask for.
    """
    device, dtype = like.device, accumulation_dtype(like.dtype)
    rows = rows_of_map(height)
    kind = mixer.kind_of_tables()
    if kind == "cosine":
        return of_band(lrpe_tables(rows, width, mixer.head_dim, device, dtype))
    if kind == "full width":
        return of_band(full_width_rotary_tables(rows, width, mixer.dim, device, dtype))
    return of_band(rotary_tables(rows, width, mixer.head_dim, device, dtype))


def mixed(mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None) -> Tensor:
    """A mixer's output, whose position tables act where it wants them.

    Args:
        mixer: The mixer.
        q: Queries, [B, N, h, D].
        k: Keys.
        v: Values.
        grid: Where the tokens stand, with position tables or without.
        x: Input of the layer, [B, N, C].
    """
    if grid.rotary is not None and mixer.description.turns == "before":
        q, k = grid.turn(q), grid.turn(k)
        grid = grid._replace(rotary=None)
    return mixer(q, k, v, grid, x if mixer.description.needs_input else None)


# One step to torch.fx, which cannot follow choices that look at shapes.
@register_notrace_module
class MixerAttention(nn.Module):
    """proj(mixer(q, k, v)) with q, k, v from one projection of the tokens.

    Parameters are named as those of timm's `Attention`: ``qkv``, ``q_norm``, ``k_norm``, ``proj``;
    those of the mixer stand under ``mixer``.
    """

    padding_rule = MASK
    row_rule = BANDED

    def __init__(
        self,
        mixer: Mixer,
        *,
        rope: bool = False,
        qk_norm: bool = False,
        qkv_bias: bool = True,
        num_prefix_tokens: int = 0,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Put the layer together.

        Args:
            mixer: Attention between the projections.
            rope: Whether tokens of the map get 2-D rotary positions; where they act is the mixer's
                affair (`AttentionDescription.turns`).
            qk_norm: Whether queries and keys go through an RMS norm over the channels of a head.
            qkv_bias: Whether the projection of the input has a bias.
            num_prefix_tokens: Tokens that stand before those of the map.
            proj_drop: Dropout rate of the output.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: There is no room for rotary positions, or the mixer has its own.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if rope:
            check_rope(mixer)
        self.num_heads = mixer.num_heads
        self.head_dim = mixer.head_dim
        self.num_prefix_tokens = num_prefix_tokens
        self.rope = rope
        self.qkv = Linear(mixer.dim, 3 * mixer.dim, bias=qkv_bias, **dd)
        self.q_norm: nn.Module = RmsNorm(mixer.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RmsNorm(mixer.head_dim, **dd) if qk_norm else nn.Identity()
        self.mixer = mixer
        self.proj = Linear(mixer.dim, mixer.dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        height: int = 0,
        width: int = 0,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend over all tokens.

        Args:
            x: A map [B, H, W, C]; or tokens [B, N, C], those before the map first.
            height: Rows of the map, for tokens.
            width: Columns of the map, for tokens.
            key_padding_mask: x.shape[:-1] bool, True for padding: equal to leaving these tokens
                out.

        Returns:
            In the shape of x.

        Raises:
            ValueError: Tokens do not make up the map.
        """
        prefix = self.num_prefix_tokens
        if x.dim() == 4:
            height, width, prefix = x.shape[1], x.shape[2], 0
        tokens = x.flatten(1, -2)
        mask = None if key_padding_mask is None else key_padding_mask.flatten(1)
        if mask is not None:
            tokens = tokens.masked_fill(mask.unsqueeze(-1), 0)
        grid = Grid(height, width, prefix, None, mask)
        grid.check(tokens)
        if self.rope:
            grid = grid._replace(rotary=position_tables(self.mixer, height, width, x))
        qkv = split_axis(self.qkv(tokens), 2, [3, self.num_heads, self.head_dim])
        q, k, v, _ = unpack(qkv)
        q, k = self.q_norm(q), self.k_norm(k)
        out = mixed(self.mixer, q, k, v, grid, tokens)
        return self.proj_drop(self.proj(out.flatten(2))).reshape(x.shape)


def check_rope(mixer: Mixer) -> None:
    """Check that a mixer can have rotary positions.

    Raises:
        ValueError: It cannot; one line says why.
    """
    name = mixer.description.name
    if mixer.description.turns == "nowhere":
        raise ValueError(f"{name} has positions of its own: leave rope out")
    cosine = mixer.description.turns == "inside" and mixer.positions == "cosine"
    multiple = 2 if cosine else 4
    if mixer.head_dim % multiple:
        raise ValueError(
            f"rope needs heads of a multiple of {multiple} channels, got {mixer.head_dim}"
        )


def create_attention(
    name: str,
    dim: int,
    num_heads: int,
    *,
    rope: bool = False,
    qk_norm: bool = False,
    qkv_bias: bool = True,
    num_prefix_tokens: int = 0,
    proj_drop: float = 0.0,
    backend: str = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> MixerAttention:
    """An attention layer by name.

    Args:
        name: One of `vitlinear.list_attentions()`.
        dim: Channels, C.
        num_heads: Heads, each of C / num_heads channels.
        rope: As `MixerAttention`, like the next four.
        qk_norm: RMS norm of queries and keys.
        qkv_bias: Bias of the projection of the input.
        num_prefix_tokens: Tokens before those of the map.
        proj_drop: Dropout rate of the output.
        backend: One of `vitlinear.ops.BACKENDS`.
        device: Where the parameters live.
        dtype: Type of the parameters.
        **options: Those of the attention; ``vitlinear attentions NAME`` lists them.

    Returns:
        The layer: maps [B, H, W, C], or tokens [B, N, C] with height and width of the map.

    Raises:
        ValueError: A name or option is unknown or out of range, or sizes do not fit; one line.
    """
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    mixer = make_mixer({"name": name, **options}, dim, num_heads, backend=backend, **dd)
    return MixerAttention(
        mixer, rope=rope, qk_norm=qk_norm, qkv_bias=qkv_bias,
        num_prefix_tokens=num_prefix_tokens, proj_drop=proj_drop, **dd,
    )  # fmt: skip


def attention_of_spec(
    spec: AttentionSpec, dim: int, num_heads: int, **kwargs: Any
) -> MixerAttention:
    """As `create_attention`, of a name or a mapping of name and options.

    Args:
        spec: As `vitlinear.mixers.split_spec`.
        dim: Channels, C.
        num_heads: Heads.
        **kwargs: As for `create_attention`, but for options.

    Raises:
        ValueError: As `create_attention`.
    """
    name, options = split_spec(spec)
    for option in options:
        if option in kwargs or option in ("rope", "qk_norm", "qkv_bias", "num_prefix_tokens"):
            raise ValueError(f"{option} is no option of {name}, but an argument of the layer")
    return create_attention(name, dim, num_heads, **kwargs, **options)
