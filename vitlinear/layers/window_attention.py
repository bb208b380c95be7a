"""Softmax attention inside windows, without positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._timm import register_notrace_module
from .heads import split_heads
from .linear import Linear
from .shifted_windows import SoftmaxAttention
from .windows import fixed_windows, from_windows, to_windows


# One step to torch.fx, for the reasons that `GatedAttention` gives.
@register_notrace_module
class PaddedWindowAttention(nn.Module):
    """Softmax attention in windows of K x K tokens: no shift, no relative position bias.

    Maps are padded with zeros to whole windows, to the right and below, and padding is attended to
    like any other token: that is how the released L2ViT models (arXiv:2501.16182) were trained, so
    that a mask would change what they compute.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            window_size: Side of a window in tokens, K.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`; softmax runs on SDPA whatever it is.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads, the window is empty, or the backend is
                unknown.
        """
        super().__init__()
        if window_size < 1:
            raise ValueError(f"a window needs a side of at least 1, got {window_size}")
        self.window_size = window_size
        self.attend = SoftmaxAttention(num_heads, split_heads(dim, num_heads), backend)
        self.qkv = Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside every window.

        Args:
            x: [B, H, W, C], of any size.

        Returns:
            [B, H, W, C].
        """
        B, H, W, C = x.shape
        side = self.window_size
        if not torch.jit.is_scripting() and torch.compiler.is_compiling():
            order, inverse = window_order(B, H, W, side, x.device)
            tokens = F.pad(x.reshape(B * H * W, C), (0, 0, 0, 1))  # a row of zeros for padding
            x = self.attend_windows(tokens[order])
            x = x.reshape(-1, C)[inverse].reshape(B, H, W, C)
        else:
            rows, cols = fixed_windows(H, side), fixed_windows(W, side)
            x = self.attend_windows(to_windows(x, rows, cols))
            x = from_windows(x, rows, cols, H, W)
        return self.proj_drop(self.proj(x))

    def attend_windows(self, x: Tensor) -> Tensor:
        """Tokens in the order of their windows, [..., C] -> [B * windows, K * K, C]."""
        tokens, heads = self.window_size * self.window_size, self.attend.num_heads
        qkv = self.qkv(x).reshape(-1, tokens, 3, heads, self.attend.head_dim)
        q, k, v = qkv.unbind(2)
        return self.attend(q, k, v)


def window_order(
    batch: int, height: int, width: int, side: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where each token of each window stands in a map, and each token of the map in the windows.

    The partition as two permutations of token numbers, for programs with symbolic sizes. As a
    reshape it would have axes for the number of windows, of which one and several are different
    programs to `torch.compile` and `torch.export`.

    Args:
        batch: Number of maps, B.
        height: Rows of a map, H.
        width: Columns of a map, W.
        side: Of the windows, K.
        device: Where the numbers are wanted.

    Returns:
        For the tokens of all windows their number in [B, H, W], or B * H * W if they are padding;
        and for the tokens of all maps their number in [B, windows, K, K]. Both have one axis.
    """
    rows, cols = (height + side - 1) // side, (width + side - 1) // side
    token = torch.arange(batch * rows * cols * side * side, device=device)
    window, place = token // (side * side), token % (side * side)
    image, row, col = _split(window, rows, cols)
    row, col = row * side + place // side, col * side + place % side
    exists = (row < height) & (col < width)
    number = (image * height + row) * width + col
    to_windows = torch.where(exists, number, batch * height * width)

    image, row, col = _split(torch.arange(batch * height * width, device=device), height, width)
    window = (image * rows + row // side) * cols + col // side
    return to_windows, (window * side + row % side) * side + col % side


def _split(number: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of places that are numbered through a batch of grids."""
    # Without %, whose divisor has to be a plain number in ONNX.
    line = number // cols
    image = line // rows
    return image, line - image * rows, number - line * cols
