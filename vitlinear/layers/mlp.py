"""Feed-forward networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .band import LOCAL
from .conv.depthwise_conv import ResidualDepthwiseConv
from .fold import fold_gelu
from .linear import Linear
from .plain import does_nothing, is_plain
from .recompute import run_recomputing


class ConvMlp(nn.Module):
    """Feed-forward network fc2(y + dw3(y)), y = GELU(fc1(x)), dw3 a depthwise convolution.

    ViT³ (arXiv:2512.01643) has a second GELU after the sum: fc2(GELU(y + dw3(y))).
    """

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        second_act: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the network.

        Args:
            dim: Channels in and out.
            hidden_dim: Channels in between.
            drop: Dropout rate of the output.
            second_act: Put the GELU after the convolution too.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.fc1: nn.Module = Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act: nn.Module = nn.GELU()
        self.dwconv = ResidualDepthwiseConv(hidden_dim, 3, device=device, dtype=dtype)
        self.act2 = nn.GELU() if second_act else None
        self.fc2 = Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.fc1(x)
        if torch.jit.is_scripting():
            x = self.dwconv(self.act(x))
            x = self.fc2(x if self.act2 is None else self.act2(x))
        elif self.act2 is None:
            x = run_recomputing((self.act, self.dwconv, self.fc2), x)
        else:
            x = run_recomputing((self.act, self.dwconv, self.act2, self.fc2), x)
        return self.drop(x)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """This network with its GELU as part of the product before it."""
        if is_plain(self, ConvMlp):
            self.fc1, self.act = fold_gelu(self.fc1, self.act)
        return self


class Mlp(nn.Module):
    """Feed-forward network fc2(GELU(fc1(x))); modules named as in `timm.layers.Mlp`."""

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the network.

        Args:
            dim: Channels in and out.
            hidden_dim: Channels in between.
            drop: Dropout rate of the hidden channels and of the output.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.fc1: nn.Module = Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act: nn.Module = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        x = self.fc1(x)
        if torch.jit.is_scripting():
            x = self.fc2(self.drop1(self.act(x)))
        elif does_nothing(self.drop1):
            x = run_recomputing((self.act, self.fc2), x)
        else:
            x = self.fc2(self.drop1(self.act(x)))
        return self.drop2(x)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """This network with its GELU as part of the product before it."""
        if is_plain(self, Mlp):
            self.fc1, self.act = fold_gelu(self.fc1, self.act)
        return self


class SwiGlu(nn.Module):
    """Gated network fc2(SiLU(fc1_g(x)) * fc1_x(x)), no biases; named as in `timm.layers.SwiGLU`."""

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the network.

        Args:
            dim: Channels in and out.
            hidden_dim: Channels in between.
            drop: Dropout rate of the hidden channels and of the output.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.fc1_g = Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.fc1_x = Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.act = nn.SiLU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim, bias=False, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        x = self.act(self.fc1_g(x)) * self.fc1_x(x)
        return self.drop2(self.fc2(self.drop1(x)))
