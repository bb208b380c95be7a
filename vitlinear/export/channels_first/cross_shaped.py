"""Attention in cross-shaped windows on maps [B, C, H, W]: each branch has products of its own."""

from __future__ import annotations

from torch import Tensor, nn

from vitlinear.layers.attention.cross_shaped_attention import (
    CrossShapedAttention,
    InjectiveStripe,
    SoftmaxStripe,
)
from vitlinear.layers.windows import equal_windows

from .attention import Slots
from .inline import ChannelsFirstInjectiveAttention
from .layers import MapSize, NoForm, convolution, linear, pointwise, require, require_nothing
from .windows import ChannelsFirstSoftmaxAttention, Windows


class ChannelsFirstStripe(nn.Module):
    """A branch of `CrossShapedAttention` with its share of the output projection."""

    hidden: Tensor | None

    def __init__(
        self,
        branch: nn.Module,
        qkv: nn.Module,
        part: tuple[int, int],
        norm: nn.LayerNorm,
        proj: nn.Conv2d,
        size: MapSize,
    ) -> None:
        """Take the parameters over.

        Args:
            branch: The branch.
            qkv: What gives q, k and v of all branches.
            part: Which one of how many branches this is.
            norm: Before them.
            proj: Its share of the output.
            size: Of the map.
        """
        super().__init__()
        require(branch, InjectiveStripe, SoftmaxStripe)
        assert isinstance(branch, InjectiveStripe | SoftmaxStripe)
        sides = (
            equal_windows(n, limit)
            for n, limit in zip((size.height, size.width), branch.limits, strict=True)
        )
        self.windows = Windows(size, *sides, norm)
        hidden = None
        if self.windows.is_padded:  # 0, and -inf for keys beyond the map
            hidden = self.windows.inside[: self.windows.count].log().flatten(2).unsqueeze(2)
        self.register_buffer("hidden", hidden)
        products_norm = self.windows.norm_of_products(norm)
        slots = Slots(qkv, 3, branch.attend.num_heads, products_norm, part=part)
        self.takes_mean = isinstance(branch, InjectiveStripe)
        self.attend: nn.Module = (
            ChannelsFirstInjectiveAttention(slots, branch.attend, None, self.windows.batch)
            if self.takes_mean
            else ChannelsFirstSoftmaxAttention(slots, branch.attend)
        )
        self.lepe = convolution(branch.lepe)
        self.proj = proj

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """[B, C, H, W] twice -> [B, C, H, W]; the second tells kernels, by its mean."""
        windows = self.windows
        x = windows.of_map(x)
        if self.takes_mean:
            out, values = self.attend(x, windows.mean(windows.cut(source)), windows=windows)
        else:
            out, values = self.attend(x, self.hidden)
            values = windows.without_padding(values)
        return windows.to_map(self.proj(out + self.lepe(values)))


class ChannelsFirstCrossShapedAttention(nn.Module):
    """`CrossShapedAttention` on a map [B, C, H, W] of one size."""

    def __init__(self, attn: nn.Module, norm: nn.LayerNorm, size: MapSize | None) -> None:
        """Take the parameters over; as `ChannelsFirstInLineAttention`."""
        super().__init__()
        require(attn, CrossShapedAttention)
        assert isinstance(attn, CrossShapedAttention)
        require_nothing(attn.proj_drop)
        if size is None:
            raise NoForm("CrossShapedAttention at any size")
        count = len(attn.branches)
        columns = linear(attn.proj).weight[:, :, 0, 0].detach().chunk(count, 1)
        biases = (attn.proj.bias, *(None for _ in range(count - 1)))
        self.branches = nn.ModuleList(
            ChannelsFirstStripe(
                branch, attn.qkv, (i, count), norm, pointwise(columns[i], biases[i]), size
            )
            for i, branch in enumerate(attn.branches)
        )

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Attend.

        Args:
            x: [B, C, H, W] without what its norm multiplies and adds.
            source: The same before the norm.

        Returns:
            [B, C, H, W].
        """
        outs = [branch(x, source) for branch in self.branches]
        return outs[0] if len(outs) == 1 else outs[0] + outs[1]
