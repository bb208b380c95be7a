"""timm's attentions with a mixer of ours between their projections.

Each takes over the projections, norms and gate of the attention that it stands for, under the same
names, so that the keys of checkpoints stay. What the mixer learns stands under ``mixer``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat, to_2tuple
from torch import Tensor, nn

from vitlinear._timm import (
    Attention,
    AttentionRope,
    BeitAttention,
    EvaAttention,
    RelPosAttention,
    SamAttention,
    SwinAttention,
    register_notrace_module,
)
from vitlinear.layers.attention.scriptable import scriptable_attention, unpack
from vitlinear.layers.layout import split_axis
from vitlinear.mixers import Grid, Mixer
from vitlinear.mixers.attention import mixed, position_tables
from vitlinear.mixers.operator import OperatorMixer

from .token_map import TokenMap


class ReplacedAttention(nn.Module):
    """proj(gate * norm(mixer(q, k, v))) of tokens, of what timm's attention has.

    Attributes:
        was: Name of the class of timm's that it stands for.
        parts: What it has of the parts of that one, of `kinds.PARTS`.
    """

    def __init__(
        self,
        old: Any,
        mixer: Mixer,
        parts: set[str],
        rope: bool = False,
        token_map: TokenMap | None = None,
        num_prefix_tokens: int = 0,
    ) -> None:
        """Take over an attention, which itself stays as it is.

        Args:
            old: One of `kinds.KINDS`, or a `ReplacedAttention`.
            mixer: For all channels and heads of its queries.
            parts: Its parts that stay, of `kinds.PARTS`.
            rope: Whether the mixer has 2-D rotary positions.
            token_map: Where the tokens stand; None where the mixer does not need to know.
            num_prefix_tokens: Tokens before those of the map.
        """
        super().__init__()
        self.was: str = old.was if isinstance(old, ReplacedAttention) else type(old).__name__
        self.parts = tuple(sorted(parts))
        self.num_heads: int = old.num_heads
        self.num_kv_groups: int = getattr(old, "num_kv_groups", 1)
        self.head_dim = mixer.head_dim
        self.qkv: nn.Linear | None = old.qkv
        self.q_proj: nn.Module | None = getattr(old, "q_proj", None)
        self.k_proj: nn.Module | None = getattr(old, "k_proj", None)
        self.v_proj: nn.Module | None = getattr(old, "v_proj", None)
        self.q_bias: nn.Parameter | None = getattr(old, "q_bias", None)
        self.v_bias: nn.Parameter | None = getattr(old, "v_bias", None)
        self.qkv_bias_separate = bool(getattr(old, "qkv_bias_separate", False))
        self.q_norm: nn.Module = _kept(old, "q_norm", "qk_norm" in parts)
        self.k_norm: nn.Module = _kept(old, "k_norm", "qk_norm" in parts)
        self.mixer: Any = mixer
        self.norm: nn.Module = _kept(old, "norm", "norm" in parts)
        self.gate: nn.Linear | None = getattr(old, "gate", None) if "gate" in parts else None
        self.proj: nn.Module = old.proj
        self.proj_drop: nn.Module = old.proj_drop
        # Tokens before those that the model's own rotary positions turn; -1 if it has none.
        turned_from = int(getattr(old, "num_prefix_tokens", 0))
        self.turned_from: int = getattr(old, "turned_from", turned_from) if "rope" in parts else -1
        self.rotate_half = bool(getattr(old, "rotate_half", False))
        self.rope_of_mixer = rope
        self.token_map = token_map
        self.map_from = num_prefix_tokens
        self.row = _row(mixer)
        self.train(old.training)

    def reset_parameters(self) -> None:
        """Initial values of biases; the modules inside have their own."""
        if self.q_bias is not None and self.v_bias is not None:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)

    def __prepare_scriptable__(self) -> ReplacedAttention:
        """This module, for TorchScript to compile.

        Raises:
            ValueError: It cannot be compiled; one line says why.
        """
        name = self.mixer.description.name
        if not self.row:
            raise ValueError(
                f"TorchScript cannot compile {name}, which is no row of the operator: torch.export "
                "and torch.compile can"
            )
        if self.rope_of_mixer:
            raise ValueError("TorchScript cannot compile rope=True: torch.export can")
        return self

    def attend(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        mask: Tensor | None = None,
        height: int = 0,
        width: int = 0,
    ) -> Tensor:
        """Attend over all tokens.

        Args:
            x: [B, N, C].
            rope: timm's sines and cosines, as its attentions take them.
            mask: [B, N] bool, True for keys that are left out.
            height: Rows of the map that the tokens are; 0 to ask the model.
            width: Columns.

        Returns:
            [B, N, C_out].
        """
        q, k, v = self.project(x, rope)
        return self.finish(self.mix(q, k, v, x, mask, height, width), x)

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens [B, N, C], [B, N, h, D] each.

        Args:
            x: The tokens.
            rope: timm's sines and cosines, as its attentions take them.
        """
        q, k, v = self.heads(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None and self.turned_from >= 0:
            q, k = self.turn(q, rope).type_as(v), self.turn(k, rope).type_as(v)
        if self.num_kv_groups > 1:
            k = k.repeat_interleave(self.num_kv_groups, dim=2)
            v = v.repeat_interleave(self.num_kv_groups, dim=2)
        return q, k, v

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections of tokens [B, N, C] by heads; keys and values may have fewer of them."""
        if self.qkv is not None:
            if self.q_bias is not None and self.v_bias is not None:
                bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
                if self.qkv_bias_separate:  # as timm: hooks and adapters of the module then act
                    qkv = self.qkv(x) + bias
                else:
                    qkv = F.linear(x, self.qkv.weight, bias)
            else:
                qkv = self.qkv(x)
            q, k, v, _ = unpack(split_axis(qkv, 2, [3, self.num_heads, self.head_dim]))
            return q, k, v
        assert self.q_proj is not None and self.k_proj is not None and self.v_proj is not None
        key_heads = self.num_heads // self.num_kv_groups
        return (
            split_axis(self.q_proj(x), 2, [self.num_heads, self.head_dim]),
            split_axis(self.k_proj(x), 2, [key_heads, self.head_dim]),
            split_axis(self.v_proj(x), 2, [key_heads, self.head_dim]),
        )

    def turn(self, x: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys [B, N, h, D], turned by timm's rotary positions."""
        x = x.transpose(1, 2)
        first, rest = x[:, :, : self.turned_from], x[:, :, self.turned_from :]
        rest = apply_rot_embed_cat(rest, rope, half=self.rotate_half)
        return torch.cat((first, rest), dim=2).transpose(1, 2)

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        mask: Tensor | None,
        height: int,
        width: int,
    ) -> Tensor:
        """Values mixed by the mixer, [B, N, h, D]; arguments as `attend`."""
        if torch.jit.is_scripting():
            scale, powers = self.mixer.head_scale(), self.mixer.powers()
            return scriptable_attention(q, k, v, self.row, None, mask, scale, None, None, powers)
        if mask is not None:
            x = x.masked_fill(mask.unsqueeze(-1), 0)
        grid = self.grid(x, height, width, mask)
        if self.rope_of_mixer:
            grid = grid._replace(rotary=position_tables(self.mixer, grid.height, grid.width, q))
        return mixed(self.mixer, q, k, v, grid, x)

    def grid(self, x: Tensor, height: int, width: int, mask: Tensor | None) -> Grid:
        """Where tokens [B, N, C] stand; in one row, where the mixer does not need to know."""
        if height:
            return Grid(height, width, 0, None, mask)
        if self.token_map is None:
            return Grid(1, x.shape[1], 0, None, mask)
        height, width = self.token_map.size()
        return Grid(height, width, self.map_from, None, mask)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """Mixed values [B, N, h, D] of tokens [B, N, C], through the rest of the layer."""
        out = self.norm(out.flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def _row(mixer: Mixer) -> str:
    """The row of the operator that a mixer is, without anything around it; or nothing."""
    if isinstance(mixer, OperatorMixer) and type(mixer).forward is OperatorMixer.forward:
        return mixer.row
    return ""


def _kept(old: Any, name: str, keep: bool) -> nn.Module:
    """A part of an attention, or nothing in its place."""
    part: nn.Module | None = getattr(old, name, None) if keep else None
    return nn.Identity() if part is None else part


def keys_left_out(attn_mask: Tensor | None, x: Tensor, is_causal: bool) -> Tensor | None:
    """Keys that an attention mask of timm's leaves out, [B, N] bool.

    Args:
        attn_mask: [B or 1, 1, 1, N]: bool, False for keys that are left out; or as it is added to
            logits: keys are left out at -1000 and less, where softmax rounds their weights to 0.
        x: Tokens, [B, N, C].
        is_causal: Whether tokens are to see only those before them.

    Raises:
        ValueError: The mask says more than that; one line says what.
    """
    if is_causal:
        raise ValueError(
            "a replaced attention has no causal form: call the model without is_causal"
        )
    if attn_mask is None:
        return None
    shape = attn_mask.shape
    if attn_mask.dim() != 4 or shape[1] != 1 or shape[2] != 1 or shape[3] != x.shape[1]:
        raise ValueError(
            "a replaced attention takes a mask of keys, [B, 1, 1, N], alone, not one for each query"
        )
    keys = attn_mask[:, 0, 0]
    if keys.dtype == torch.bool:
        hidden = torch.logical_not(keys)
    else:
        hidden = keys <= -1e3
        if not torch.jit.is_scripting():
            check_hides(keys)
    return hidden.expand(x.shape[0], -1)


@torch.jit.ignore
def check_hides(keys: Tensor) -> None:
    """Check that what is added to logits is 0 or hides the key.

    Nothing is looked at where that would cost a wait for the device, or stop a compiler: there,
    numbers that do not hide the key count as 0.

    Raises:
        ValueError: It is neither.
    """
    if torch.compiler.is_compiling() or keys.device.type != "cpu":
        return
    if not ((keys == 0) | (keys <= -1e3)).all():
        raise ValueError("a replaced attention takes masks that hide keys, not biases of logits")


# Each of these is one step to torch.fx, which cannot follow choices that look at shapes.
@register_notrace_module
class ReplacedPlainAttention(ReplacedAttention):
    """In the place of timm's `Attention`."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]; a mask as `keys_left_out` takes it."""
        return self.attend(x, None, keys_left_out(attn_mask, x, is_causal))


@register_notrace_module
class ReplacedRotaryAttention(ReplacedAttention):
    """In the place of timm's `AttentionRope` and `EvaAttention`."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]; a mask as `keys_left_out` takes it."""
        return self.attend(x, rope, keys_left_out(attn_mask, x, is_causal))


@register_notrace_module
class ReplacedBeitAttention(ReplacedAttention):
    """In the place of BEiT's attention, without its biases."""

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Nothing: there is no table of biases to resize."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; biases that blocks have in common are not looked at."""
        return self.attend(x)


@register_notrace_module
class ReplacedRelPosAttention(ReplacedAttention):
    """In the place of timm's `RelPosAttention`, without its biases."""

    rel_pos: None = None  # which `set_input_size` of the model asks for

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; biases that blocks have in common are not looked at."""
        return self.attend(x)


@register_notrace_module
class ReplacedMapAttention(ReplacedAttention):
    """In the place of the attention of timm's SAM, on maps or windows of them."""

    def __init__(self, old: Any, mixer: Mixer, parts: set[str], **kwargs: Any) -> None:
        """Take over an attention; arguments as `ReplacedAttention`."""
        super().__init__(old, mixer, parts, **kwargs)
        self.rope: Any = getattr(old, "rope", None) if "rope" in parts else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        rope: Tensor | None = None
        if self.rope is not None:
            rope = self.rope.get_embed()
        tokens = x.flatten(1, 2)
        return self.attend(tokens, rope, None, x.shape[1], x.shape[2]).reshape(x.shape)


@register_notrace_module
class ReplacedWindowAttention(ReplacedAttention):
    """In the place of Swin's attention in windows, without its biases.

    A shifted window at the end of a side holds tokens of up to four regions of the map, which do
    not see each other. Each is mixed apart, the rest of the window being padding.
    """

    def __init__(self, old: Any, mixer: Mixer, parts: set[str], **kwargs: Any) -> None:
        """Take over an attention; arguments as `ReplacedAttention`."""
        super().__init__(old, mixer, parts, **kwargs)
        self.window_size: tuple[int, int] = to_2tuple(old.window_size)
        self.masked = "mask" in parts

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Tell the size of the windows."""
        self.window_size = to_2tuple(window_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend in windows.

        Args:
            x: Windows, [B * windows, N, C].
            mask: [windows, N, N], 0 for pairs of one region.

        Returns:
            In the shape of x.
        """
        height, width = self.window_size
        if mask is None or not self.masked:
            return self.attend(x, None, None, height, width)
        regions = regions_of(mask).repeat(x.shape[0] // mask.shape[0], 1)
        q, k, v = self.project(x)
        out = torch.zeros_like(v)
        for region in range(4):
            outside = regions != region
            # A window without this region is not hidden whole: nothing of it is taken.
            hidden = outside & torch.logical_not(outside.all(dim=1, keepdim=True))
            of_region = self.mix(q, k, v, x, hidden, height, width)
            out = torch.where(outside[:, :, None, None], out, of_region)
        return self.finish(out, x)


def regions_of(mask: Tensor) -> Tensor:
    """Numbers from 0 of the regions of windows.

    Args:
        mask: [windows, N, N], 0 for pairs of one region.

    Returns:
        [windows, N]; the first token is of region 0.
    """
    first = (mask == 0).to(torch.int64).argmax(dim=2)
    begins = first == torch.arange(mask.shape[1], device=mask.device)
    return (begins.to(torch.int64).cumsum(dim=1) - 1).gather(1, first)


REPLACED: dict[type[nn.Module], type[ReplacedAttention]] = {
    Attention: ReplacedPlainAttention,
    AttentionRope: ReplacedRotaryAttention,
    EvaAttention: ReplacedRotaryAttention,
    BeitAttention: ReplacedBeitAttention,
    RelPosAttention: ReplacedRelPosAttention,
    SamAttention: ReplacedMapAttention,
    SwinAttention: ReplacedWindowAttention,
}
