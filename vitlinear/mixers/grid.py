"""The grid that tokens stand on, and what is known of it, as mixers are told."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitlinear.layers.attention.scriptable_state import turned
from vitlinear.layers.band import Band, band_in_use
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

    def needs_whole_map(self, what: str) -> None:
        """Refuse to run on bands of rows.

        Args:
            what: Cannot, in words.

        Raises:
            ValueError: There is a band in use.
        """
        if band_in_use() is not None:
            raise ValueError(
                f"{what} cannot run on bands of rows: what a row gets depends on its distance to "
                "all others; take the form without an order"
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
        """How many tokens are no padding, [B, 1, 1, 1] in the type of x, at least 1; or N.

        On bands of rows, of all bands, as the sums below.
        """
        mask, band = self.key_padding_mask, band_in_use()
        if mask is None:
            return x.shape[1] if band is None else band.prefix + band.height * self.width
        if band is not None:
            mask = band.own_tokens(mask)
        count = (~mask).sum(1).to(x.dtype)[:, None, None, None]
        if band is not None:
            (count,) = band.merge((count,), _added)
        return count.clamp(min=1)

    def hide(self, x: Tensor) -> Tensor:
        """Tokens [B, N, h, D] with zeros for padding, whatever stood there."""
        mask = self.key_padding_mask
        return x if mask is None else x.masked_fill(mask[:, :, None, None], 0)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the tokens that are no padding, [B, N, h, D] -> [B, 1, h, D].

        Padding has to be hidden already.
        """
        return self.sum(x) / self.number(x)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the tokens, [B, N, h, D] -> [B, 1, h, D]; padding has to be hidden already."""
        band = band_in_use()
        if band is None:
            return x.sum(1, keepdim=True)
        own = band.own_tokens(x).sum(1, keepdim=True)
        (total,) = band.merge((own,), _added)
        return total

    def token_softmax(self, logits: Tensor) -> Tensor:
        """Softmax over the tokens that are no padding, [B, N, h, D], of each channel."""
        mask, band = self.key_padding_mask, band_in_use()
        if band is not None:
            return _softmax_of_bands(band, logits, mask)
        if mask is not None:
            # Of a sample of padding alone, all tokens count: over none, softmax is NaN.
            seen = ~mask | mask.all(1, keepdim=True)
            logits = logits.masked_fill(~seen[:, :, None, None], -torch.inf)
        return logits.softmax(1)


def _added(a: tuple[Tensor], b: tuple[Tensor]) -> tuple[Tensor]:
    return (a[0] + b[0],)


def _softmax_of_bands(band: Band, logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the tokens of all bands, [B, n, h, D]; 0 for padding.

    Of a sample of padding alone every weight is 0, as is what comes of it.
    """
    if mask is not None:
        logits = logits.masked_fill(mask[:, :, None, None], -torch.inf)
    own = band.own_tokens(logits)
    largest = own.detach().amax(1, keepdim=True).clamp(min=-1e30)  # finite, where all is padding

    def merged(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        most = torch.maximum(a[0], b[0])
        return most, a[1] * (a[0] - most).exp() + b[1] * (b[0] - most).exp()

    total = (own - largest).exp().sum(1, keepdim=True)
    largest, total = band.merge((largest, total), merged)
    return (logits - largest).exp() / total.clamp(min=torch.finfo(total.dtype).tiny)
