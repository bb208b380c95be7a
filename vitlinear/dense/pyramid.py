"""Maps of four scales from the one map of a model that has a single resolution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitlinear.layers.band import LOCAL
from vitlinear.models._valid_region import valid_region


class SimpleFeaturePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (arXiv:2203.16527, section 3 and appendix A.2).

    From a map of stride s, maps of strides s/4, s/2, s and 2s, each made from it alone: by two
    2x2 deconvolutions of stride 2 with a layer norm and GELU between them, by one, by nothing,
    and by 2x2 max pooling of stride 2. Each deconvolution halves the channels, which the paper
    leaves open. Its convolutions to one width, 1x1 and 3x3 on each level, are the FPN's to make.

    Attributes:
        channels: Of the maps given: out of C/4, C/2, C, C.
        scales: Their strides over that of the map taken: out of 1/4, 1/2, 1, 2.
    """

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the levels that are asked for.

        Args:
            dim: Channels of the map taken, C.
            out_indices: Levels to give, ascending, out of 0 to 3; 0 is the finest.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide by 4, or there is no such level.
        """
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"a simple feature pyramid halves channels twice; {dim} do not divide")
        out_indices = checked_indices(out_indices, 4)

        def up(in_dim: int) -> nn.Module:
            return nn.ConvTranspose2d(in_dim, in_dim // 2, 2, stride=2, device=device, dtype=dtype)

        def level(index: int) -> nn.Module:
            if index == 0:
                norm = LayerNorm2d(dim // 2, device=device, dtype=dtype)
                return nn.Sequential(up(dim), norm, nn.GELU(), up(dim // 2))
            if index == 1:
                return up(dim)
            # Rounded up, as the strides of the other models: a single row does not vanish.
            return nn.Identity() if index == 2 else nn.MaxPool2d(2, stride=2, ceil_mode=True)

        self.levels = nn.ModuleDict({str(index): level(index) for index in out_indices})
        self.channels = tuple((dim // 4, dim // 2, dim, dim)[index] for index in out_indices)
        self.scales = tuple(2.0 ** (index - 2) for index in out_indices)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] -> maps [B, C_i, H_i, W_i]; H_i out of 4H, 2H, H, ceil(H/2)."""
        return tuple(
            self.pool(level, x) if isinstance(level, nn.MaxPool2d) else level(x)
            for level in self.levels.values()
        )

    def pool(self, level: nn.Module, x: Tensor) -> Tensor:
        """Pooling to which the padding of a batch is what lies outside of a map."""
        region = valid_region()
        if region is None:
            return level(x)
        mask = region.mask(x.shape[2], x.shape[3], x.device).unsqueeze(1)
        x = level(x.masked_fill(mask, -torch.inf))
        mask = region.mask(x.shape[2], x.shape[3], x.device).unsqueeze(1)
        return x.masked_fill(mask, 0)


def checked_indices(given: Any, count: int) -> tuple[int, ...]:
    """Indices of maps as a tuple.

    Args:
        given: A number or several, of whatever type a config has.
        count: How many maps there are.

    Raises:
        ValueError: They are not ascending whole numbers, or there is no such map.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str)
    indices = tuple(given) if several else (given,)
    # True is 1, and 1.0 equals it: in an index either is a slip.
    wrong = [x for x in indices if not isinstance(x, Integral) or isinstance(x, bool)]
    wrong = wrong or [x for x in indices if not 0 <= x < count]
    if wrong or not indices or list(indices) != sorted(set(indices)):
        which = f", where {wrong[0]!r} is none of them" if wrong else ""
        raise ValueError(
            f"out_indices must be ascending, out of 0 to {count - 1}; got {given!r}{which}"
        )
    return tuple(map(int, indices))
