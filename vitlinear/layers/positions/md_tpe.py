"""Positions from exponential filters along the axes of a map (MD-TPE)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import accumulation_dtype
from vitlinear.ops.eager import without_autocast

from ..band import BANDED, LOCAL, Band, band_in_use
from ..heads import split_heads
from ..linear import Linear
from ..padding_rule import ZEROS
from ..rms_norm import HeadRmsNorm


# One step to torch.fx, as `GatedAttention`.
@register_notrace_module
class AxisTpe(nn.Module):
    """Toeplitz positional encoding along one axis: proj(norm(y)) with a filter y of each head.

    y_n = (q . k) sum_{m <= n} lambda^(n - m) x_m, that is linear attention with decay whose queries
    and keys are parameters and whose values are the tokens. q, k and lambda = sigmoid(log_decay)
    are learned for each head. With L tokens along the axis the filters are L x L matrices, shared
    by all lines of the map: the cost of a map grows with H W (H + W), and at 1024 pixels is still
    below that of the projection.

    Causal along the axis, as in the modules that the authors have published; whether their vision
    models are is not known.
    """

    row_rule = LOCAL  # along the columns; along the rows `MdTpe` asks for `over_bands`

    def __init__(
        self,
        dim: int,
        num_heads: int,
        bidirectional: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the encoding.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            bidirectional: Sum over the tokens on both sides, lambda^|n - m|.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = split_heads(dim, num_heads)
        self.bidirectional = bidirectional
        self.query = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.key = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.log_decay = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.norm = HeadRmsNorm(dim, num_heads, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries and keys of one, a decay of one half; projection and norm have their own."""
        nn.init.ones_(self.query)
        nn.init.ones_(self.key)
        nn.init.zeros_(self.log_decay)

    def forward(self, x: Tensor) -> Tensor:
        """Lines of tokens, [B, lines, L, C] -> [B, lines, L, C]."""
        dtype = accumulation_dtype(x.dtype)
        if torch.jit.is_scripting():
            y = self.filter(x.to(dtype))
        else:
            with without_autocast(x):
                y = self.filter(x.to(dtype))
        return self.proj(y.to(x.dtype))

    def filter(self, x: Tensor) -> Tensor:
        """norm(y) in the type of x."""
        kernel = self.kernel(x.shape[2], x.dtype)
        x = x.reshape(x.shape[0], x.shape[1], x.shape[2], self.num_heads, self.head_dim)
        return self.norm(torch.einsum("hnm,blmhd->blnhd", kernel, x))

    @torch.jit.ignore
    def over_bands(self, band: Band, x: Tensor) -> Tensor:
        """`forward` along the rows of a map, of those of a band.

        What a band passes on to all rows below, or above, is a line of tokens: its sum with the
        decay to its last row, or to its first one.

        Args:
            band: Without rows of its neighbours.
            x: [B, lines, rows, C].

        Returns:
            [B, lines, rows, C].

        Raises:
            ValueError: The band has rows of its neighbours.
        """
        if (band.start, band.stop) != band.own:
            raise ValueError("MD-TPE takes bands without rows of their neighbours")
        dtype = accumulation_dtype(x.dtype)
        with without_autocast(x):
            y = x.to(dtype).unflatten(-1, [self.num_heads, self.head_dim])
            rows = torch.arange(y.shape[2], device=x.device)
            out = torch.einsum("hnm,blmhd->blnhd", self.kernel(len(rows), dtype), y)
            (sums,) = band.gather(2, self._decayed_sum(y, rows.flip(0)).unsqueeze(2))
            # Bands lie in order, so those above are the first ones, those below the last.
            above = [band.start - stop for _, stop in band.cuts if stop <= band.start]
            distance = torch.tensor(above, device=x.device, dtype=torch.int64)
            carried = self._decayed_sum(sums[:, :, : len(above)], distance)
            out = out + self._decayed(carried, rows + 1, dtype)
            if self.bidirectional:
                (sums,) = band.gather(2, self._decayed_sum(y, rows).unsqueeze(2))
                below = [start - band.stop for start, _ in band.cuts if start >= band.stop]
                distance = torch.tensor(below, device=x.device, dtype=torch.int64)
                carried = self._decayed_sum(sums[:, :, len(band.cuts) - len(below) :], distance)
                out = out + self._decayed(carried, rows.flip(0) + 1, dtype)
            y = self.norm(out)
        return self.proj(y.to(x.dtype))

    def _powers(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """lambda^distance, [n, h, 1]."""
        log_decay = F.logsigmoid(self.log_decay.to(dtype))
        return (distance[:, None, None] * log_decay[:, None]).exp()

    def _decayed_sum(self, x: Tensor, distance: Tensor) -> Tensor:
        """sum_n lambda^distance_n x_n, [B, lines, n, h, D] -> [B, lines, h, D]."""
        return (self._powers(distance, x.dtype) * x).sum(2)

    def _decayed(self, x: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """(q . k) lambda^distance x, [B, lines, h, D] -> [B, lines, n, h, D]."""
        q, k = self.query.to(dtype), self.key.to(dtype)
        strength = (q * k).reshape(self.num_heads, -1).sum(1)[:, None]
        return strength * self._powers(distance, dtype) * x.unsqueeze(2)

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """The filters of all heads, [h, length, length]: from row n to the tokens m that it sees.

        Exact for any decay between 0 and 1, since powers are taken of its logarithm and never of
        an inverse.
        """
        place = torch.arange(length, device=self.log_decay.device)
        distance = place[:, None] - place
        log_decay = F.logsigmoid(self.log_decay.to(dtype))[:, None, None]
        power = (distance.abs() * log_decay).exp()
        if not self.bidirectional:
            power = power.masked_fill(distance < 0, 0.0)
        q, k = self.query.to(dtype), self.key.to(dtype)
        return (q * k).reshape(self.num_heads, -1).sum(1)[:, None, None] * power


class MdTpe(nn.Module):
    """The sum of an `AxisTpe` along the rows and one along the columns; no residual.

    Source: described with LightNet, arXiv:2405.21022.
    """

    padding_rule = ZEROS
    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        bidirectional: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the encoding; arguments as `AxisTpe`."""
        super().__init__()
        self.rows = AxisTpe(dim, num_heads, bidirectional, device=device, dtype=dtype)
        self.cols = AxisTpe(dim, num_heads, bidirectional, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        if not torch.jit.is_scripting():
            band = band_in_use()
            if band is not None:
                band.check_rows(x.shape[1])
                down = self.rows.over_bands(band, x.transpose(1, 2)).transpose(1, 2)
                return down + self.cols(x)
        down = self.rows(x.transpose(1, 2)).transpose(1, 2)
        return down + self.cols(x)
