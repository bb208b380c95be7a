"""The grid that tokens stand on, and what is known of it, as mixers are told."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitlinear.layers.attention.scriptable_state import turned
from vitlinear.layers.layout import split_axis
from vitlinear.ops import RotaryTables


class Grid(NamedTuple):
    """Tokens of a map, row by row, after some that stand nowhere, such as a class token.

    Attributes:
        height: Rows of the map, H.
        width: Columns of the map, W.
        num_prefix_tokens: Tokens before those of the map, P; N = P + H W.
        rotary: Position tables of the map.
        key_padding_mask: [B, N] bool, True for padding.
    """

    height: int
    width: int
    num_prefix_tokens: int = 0
    rotary: RotaryTables | None = None
    key_padding_mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens, N."""
        return self.num_prefix_tokens + self.height * self.width

    def check(self, x: Tensor) -> None:
        """Check that tokens [B, N, ...] are those of the grid.

        Raises:
            ValueError: There are more or fewer.
        """
        if x.shape[1] != self.length:
            raise ValueError(
                f"{x.shape[1]} tokens are not the {self.num_prefix_tokens} and {self.height} x "
                f"{self.width} of the grid"
            )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, ...] -> those before the map [B, P, ...], and the map [B, H, W, ...]."""
        prefix = self.num_prefix_tokens
        return x[:, :prefix], split_axis(x[:, prefix:], 1, [self.height, self.width])

    def join(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """The inverse of `split`."""
        tokens = tokens.flatten(1, 2)
        return torch.cat((prefix, tokens), dim=1) if self.num_prefix_tokens else tokens

    def turn(self, x: Tensor) -> Tensor:
        """Tokens [B, N, h, D] whose map is turned by the position tables, where there are some."""
        if self.rotary is None:
            return x
        prefix = self.num_prefix_tokens
        if prefix == 0:
            return turned(x, self.rotary)
        return torch.cat((x[:, :prefix], turned(x[:, prefix:], self.rotary)), dim=1)

    def valid(self) -> Tensor | None:
        """Tokens that are no padding, [B, N, 1, 1] bool; None without padding."""
        mask = self.key_padding_mask
        return None if mask is None else ~mask[:, :, None, None]

    def number(self, x: Tensor) -> Tensor | int:
        """How many tokens are no padding, [B, 1, 1, 1] in the type of x, at least 1; or N."""
        mask = self.key_padding_mask
        if mask is None:
            return x.shape[1]
        return (~mask).sum(1).clamp(min=1).to(x.dtype)[:, None, None, None]

    def hide(self, x: Tensor) -> Tensor:
        """Tokens [B, N, h, D] with zeros for padding, whatever stood there."""
        mask = self.key_padding_mask
        return x if mask is None else x.masked_fill(mask[:, :, None, None], 0)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the tokens that are no padding, [B, N, h, D] -> [B, 1, h, D].

        Padding has to be hidden already.
        """
        return x.sum(1, keepdim=True) / self.number(x)

    def token_softmax(self, logits: Tensor) -> Tensor:
        """Softmax over the tokens that are no padding, [B, N, h, D], of each channel."""
        mask = self.key_padding_mask
        if mask is not None:
            # Of a sample of padding alone, all tokens count: over none, softmax is NaN.
            seen = ~mask | mask.all(1, keepdim=True)
            logits = logits.masked_fill(~seen[:, :, None, None], -torch.inf)
        return logits.softmax(1)
