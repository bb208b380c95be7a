"""Softmax, the mechanisms of the library's families, and their plain baselines, as mixers.

What the families' own layers have around them stays there: output multipliers, depthwise
convolutions of the values, InLine's dynamic convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitlinear.layers.attention.scriptable_state import scriptable_read, scriptable_state
from vitlinear.layers.band import BANDED
from vitlinear.layers.conv.depthwise_conv import DepthwiseConv
from vitlinear.layers.init_normal import init_normal_
from vitlinear.ops import accumulation_dtype
from vitlinear.ops.eager import widen
from vitlinear.ops.inner_step import gated, inner_values, stepped

from .convolution import naive_convolution
from .description import AttentionDescription
from .grid import Grid
from .mixer import Mixer
from .operator import OperatorMixer, attend
from .registry import register

BACKENDS = ("eager", "library", "triton")
# Above it, softmax is no study but a mistake: 64 times 64 times the tokens of a map at 224 pixels.
MOST_SOFTMAX_TOKENS = 2**17


@register(
    AttentionDescription(
        name="softmax",
        formula="softmax(s q k^T) v",
        paper="arXiv:1706.03762",
        title="Attention Is All You Need",
        year=2017,
        cost="2 N^2 D",
        state="2 N D",
        order="free",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=True,
        backends=("eager",),
        turns="inside",
        most_tokens=MOST_SOFTMAX_TOKENS,
    )
)
class Softmax(OperatorMixer):
    """Softmax attention on PyTorch's fused kernels, what all others are compared with."""

    row = "softmax"


@register(
    AttentionDescription(
        name="elu",
        formula="phi(q) S / (phi(q) m), phi = elu + 1, S = mean phi(k) v^T, m = mean phi(k)",
        paper="arXiv:2006.16236",
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        year=2020,
        cost="2 N D^2",
        state="D (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        turns="inside",
    )
)
class Elu(OperatorMixer):
    """Plain linear attention."""

    row = "elu"


@register(
    AttentionDescription(
        name="relu",
        formula="phi(q) S / (phi(q) m), phi = ReLU, S = mean phi(k) v^T, m = mean phi(k)",
        paper="arXiv:2205.14756",
        title="EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction",
        year=2022,
        cost="2 N D^2",
        state="D (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=False,
        injective=False,
        backends=BACKENDS,
        turns="inside",
    )
)
class Relu(OperatorMixer):
    """Plain linear attention with ReLU."""

    row = "relu"


@register(
    AttentionDescription(
        name="rala",
        formula="phi(q) S / (phi(q) m), S = mean w_j phi(k_j) v_j^T, w = N softmax(s qbar phi(k))",
        paper="arXiv:2411.07635",
        title="Breaking the Low-Rank Dilemma of Linear Attention",
        year=2024,
        cost="2 N D^2",
        state="D (D + 3)",
        order="free",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        turns="inside",
    )
)
class Rala(OperatorMixer):
    """Rank-augmented linear attention: one global query weighs the keys."""

    row = "rala"


@register(
    AttentionDescription(
        name="mala",
        formula="(1 + 1/t) s phi(q) S - t vbar, t = s phi(q) m, phi = elu + 1",
        paper="arXiv:2507.00698",
        title="Rectifying Magnitude Neglect in Linear Attention",
        year=2025,
        cost="2 N D^2",
        state="D (D + 2)",
        order="free",
        positive=False,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        turns="inside",
    )
)
class Mala(OperatorMixer):
    """Magnitude-aware linear attention."""

    row = "mala"


@register(
    AttentionDescription(
        name="inline",
        formula="s q S + (1 - s q kbar) vbar, S = mean k v^T",
        paper="arXiv:2412.06590",
        title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        year=2024,
        cost="2 N D^2",
        state="D (D + 2)",
        order="free",
        positive=False,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=True,
        backends=BACKENDS,
        turns="inside",
    )
)
class Inline(OperatorMixer):
    """Injective linear attention: subtraction in the place of division."""

    row = "inline"


@register(
    AttentionDescription(
        name="nala",
        formula="phi(q) S / (phi(q) m), phi = [u+^p; u-^p], u = q/|q|, p = 3 (0.5 + tanh |q|)",
        paper="arXiv:2506.21137",
        title="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
        year=2025,
        cost="4 N D^2",
        state="2 D (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        turns="inside",
    )
)
class Nala(OperatorMixer):
    """Norm-aware linear attention: the norm of a query is the power of its features."""

    row = "nala"


@register(
    AttentionDescription(
        name="l2",
        formula="tau phi(q) S / max(phi(q) m, 100 / N), phi = ReLU",
        paper="arXiv:2501.16182",
        title="The Linear Attention Resurrection in Vision Transformer",
        year=2025,
        cost="2 N D^2",
        state="D (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        turns="inside",
    )
)
class L2(OperatorMixer):
    """Linear global attention of L2ViT, with a temperature for each head."""

    row = "l2"

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.temperature = nn.Parameter(torch.empty(num_heads, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Temperatures of D^-0.5."""
        nn.init.constant_(self.temperature, self.head_dim**-0.5)

    def head_scale(self) -> Tensor:
        """tau, [h]."""
        return self.temperature


@register(
    AttentionDescription(
        name="lightnet",
        formula="SiLU(q) sum_j kappa_j v_j^T, kappa = softmax of k over the tokens, by channel",
        paper="arXiv:2405.21022",
        title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        year=2024,
        cost="2 N D^2",
        state="D (D + 1)",
        order="free",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        turns="inside",
        origin="The form without a scan follows from the recurrence; its norm and gate stay in "
        "the layer LightNetAttention.",
    )
)
class LightNet(OperatorMixer):
    """LightNet's attention: keys that are a softmax over the tokens, and no division."""

    row = "lightnet"
    positions = "cosine"


@register(
    AttentionDescription(
        name="polaformer",
        formula="first half of v by phi(q) phi(k), second by phi(-q) phi(k); phi = [x+^p; x-^p]",
        paper="arXiv:2501.15061",
        title="PolaFormer: Polarity-aware Linear Attention for Vision Transformers",
        year=2025,
        cost="4 N D^2",
        state="2 D (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
    )
)
class PolaFormer(OperatorMixer):
    """Polarity-aware linear attention with a learned power for each channel."""

    row = "pola"

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        if self.head_dim % 2:
            raise ValueError(f"polaformer needs heads of an even width, got {self.head_dim}")
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.power = nn.Parameter(torch.empty(num_heads, self.head_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Powers of 3."""
        nn.init.zeros_(self.power)

    def powers(self) -> Tensor:
        """p = 1 + 4 sigmoid(power), [h, D], float32 or float64."""
        return 1 + 4 * self.power.to(accumulation_dtype(self.power.dtype)).sigmoid()


@register(
    AttentionDescription(
        name="mila",
        formula="phi(q) S / (phi(q) m) + dw3(v), phi = elu + 1",
        paper="arXiv:2405.16605",
        title="Demystify Mamba in Vision: A Linear Attention Perspective",
        year=2024,
        cost="2 N D^2 + 9 N D",
        state="D (D + 1)",
        order="local",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        turns="inside",
        origin="The values are a projection of their own; in MILA they are its input.",
    )
)
class Mila(Mixer):
    """Linear attention of MILA: rotary positions of the full width, and a convolution of values."""

    positions = "full width"
    row_rule = BANDED

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.lepe = DepthwiseConv(dim, 3, **dd)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Mix values; see `Mixer.forward`."""
        grid.check(q)
        return attend(q, k, v, "elu", grid, lepe=self.local(v, grid), backend=self.backend)

    def local(self, v: Tensor, grid: Grid) -> Tensor:
        """The convolution of the values of the map, [B, N, h, D]; 0 for tokens before it."""
        prefix, values = grid.split(grid.hide(v))
        out = self.lepe(values.flatten(3)).reshape(values.shape)
        return grid.join(torch.zeros_like(prefix), out)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        from vitlinear.ops import naive

        rotary = grid.rotary
        out = naive.linear_attention(q, k, v, "elu", rotary)
        prefix, values = grid.split(v)
        local = naive_convolution(self.lepe, values)
        return out + grid.join(torch.zeros_like(prefix), local)


@register(
    AttentionDescription(
        name="vittt",
        formula="f(q), f(x) = (W1^T x) SiLU(W2^T x) after one step of descent on -mean v . f(k)",
        paper="arXiv:2512.01643",
        title="ViT^3: Unlocking Test-Time Training in Vision",
        year=2025,
        cost="6 N D^2",
        state="2 D^2",
        order="free",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        origin="The gated unit of the layer TttAttention alone; its convolution stays there.",
    )
)
class Vittt(Mixer):
    """A gated unit for each head that takes a step of training on keys and values."""

    row_rule = BANDED

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        shape = (num_heads, self.head_dim, self.head_dim)
        self.w1 = nn.Parameter(torch.empty(shape, **dd))
        self.w2 = nn.Parameter(torch.empty(shape, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights."""
        for weight in (self.w1, self.w2):
            init_normal_(weight, std=0.02)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Mix values; see `Mixer.forward`."""
        grid.check(q)
        # Keys get two gradients, whose sum may be more than float16 holds.
        q, k, v = grid.hide(q), grid.hide(k), grid.hide(v)
        if k.dtype == torch.float16:
            k = widen(k, torch.float32).half()
        mask = grid.key_padding_mask
        first = torch.cat((self.w1, self.w2), dim=2).unsqueeze(0)
        # For each sample: a batch of one would ask torch.export whether there are more.
        first = first.to(accumulation_dtype(k.dtype)).expand(k.shape[0], -1, -1, -1)
        reads = scriptable_read(k, first, None, None, self.backend)
        values = inner_values(v.transpose(1, 2), reads.transpose(1, 2)).transpose(1, 2)
        state = scriptable_state(k, values, mask, self.backend)
        return gated(scriptable_read(q, stepped(first, state, 2), None, mask, self.backend))

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The step of descent by autograd; see `Mixer.definition`."""

        def unit(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
            a = torch.einsum("bnhd,bhde->bnhe", x, w1)
            return a * nn.functional.silu(torch.einsum("bnhd,bhde->bnhe", x, w2))

        weights = [w.expand(q.shape[0], -1, -1, -1) for w in (self.w1, self.w2)]
        with torch.enable_grad():
            weights = [w if w.requires_grad else w.detach().requires_grad_() for w in weights]
            loss = -(unit(k, *weights) * v).sum() / k.shape[1] / 3
            slopes = torch.autograd.grad(loss, weights, create_graph=True)
        steps = [slope / (slope.norm(dim=2, keepdim=True) + 1) for slope in slopes]
        return unit(q, *(w - step for w, step in zip(weights, steps, strict=True)))
