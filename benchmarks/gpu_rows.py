"""Rows of the GPU benchmark: attention calls of real models, and what they are compared with.

A row is one attention: mechanism, samples, grid, heads and channels of a head, as a model calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitlinear import ops
from vitlinear.ops.rotary import token_table

COMPILED = "compiled eager"

# Tensors of the size of q that have to cross the memory bus, and those that our kernels move: their
# passes, counted (accounts/gpu.md). An epilogue adds lepe and gate, and their gradients backward.
FORWARD_MINIMUM, BACKWARD_MINIMUM = {"rala": 5}, {"rala": 8}
FORWARD_MOVED, BACKWARD_MOVED = {"rala": 5}, {"rala": 11, "lightnet": 9}


class Shape(NamedTuple):
    """One attention call.

    Attributes:
        where: The model and place that it is taken from.
        mechanism: Key in `vitlinear.ops.MECHANISMS`.
        batch: Samples; windows count.
        height: Rows of the grid.
        width: Columns of the grid.
        heads: Heads.
        dim: Channels of a head.
        compare: Whether the costly comparisons run too: compiled formula, transcription, SDPA.
        epilogue: Whether (out + lepe) * gate is part of it, gate being a slice of the projection.
    """

    where: str
    mechanism: str
    batch: int
    height: int
    width: int
    heads: int
    dim: int
    compare: bool = False
    epilogue: bool = False

    @property
    def length(self) -> int:
        """N."""
        return self.height * self.width

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q in bfloat16."""
        return 2 * self.batch * self.length * self.heads * self.dim

    def minimum(self) -> tuple[int, int]:
        """Tensors that any implementation has to move, forward and backward."""
        forward = FORWARD_MINIMUM.get(self.mechanism, 4)
        backward = BACKWARD_MINIMUM.get(self.mechanism, 7)
        return forward + 2 * self.epilogue, backward + 4 * self.epilogue

    def moved(self) -> tuple[int, int]:
        """Tensors that our kernels move, forward and backward."""
        forward = FORWARD_MOVED.get(self.mechanism, 4)
        backward = BACKWARD_MOVED.get(self.mechanism, 7)
        return forward + 2 * self.epilogue, backward + 4 * self.epilogue


SHAPES = (
    # Classification, 64 images of 224 pixels. The first rows are those that a bar is set for.
    Shape("ravlt_t stage 1", "rala", 64, 56, 56, 1, 64, True),
    Shape("mavit_t stage 1", "mala", 64, 56, 56, 1, 64, True),
    Shape("4096 tokens, for the bar against SDPA", "mala", 16, 64, 64, 4, 64, True),
    Shape("32761 tokens, likewise", "mala", 8, 181, 181, 4, 64, True),
    Shape("ravlt_t stage 1, whole", "rala", 64, 56, 56, 1, 64, True, True),
    Shape("mavit_t stage 1, whole", "mala", 64, 56, 56, 1, 64, True, True),
    Shape("eight maps of 128 x 128, wide", "mala", 8, 128, 128, 4, 64, True),
    Shape("two maps of 256 x 256, wide", "rala", 2, 256, 256, 4, 64, True),
    Shape("nalaformer_t stage 1", "nala", 64, 56, 56, 1, 64, True),
    Shape("l2vit_tiny stage 1", "l2", 64, 56, 56, 3, 32),
    Shape("lightnet_small", "lightnet", 64, 14, 14, 6, 64),
    # With a token for the class.
    Shape("inline_deit_tiny", "inline", 64, 1, 197, 6, 32, True),
    Shape("inline_swin_tiny stage 1", "inline", 64, 56, 56, 3, 32, True),
    Shape("ravlt_t stage 2", "rala", 64, 28, 28, 2, 64),
    Shape("ravlt_t_linear stage 3", "rala", 64, 14, 14, 4, 64, True),
    Shape("mavit_t stage 2", "mala", 64, 28, 28, 2, 64),
    Shape("mavit_t_linear stage 3", "mala", 64, 14, 14, 4, 64),
    Shape("ravlt_t_linear stage 4", "rala", 64, 7, 7, 8, 64, True),
    Shape("mavit_t_linear stage 4", "mala", 64, 7, 7, 8, 64),
    Shape("nalaformer_t stage 2", "nala", 64, 28, 28, 2, 64),
    Shape("l2vit_tiny stage 3", "l2", 64, 14, 14, 12, 32),
    Shape("l2vit_tiny stage 4", "l2", 64, 7, 7, 24, 32),
    # Dense prediction: two images of 800 x 1216 pixels.
    Shape("detection, stride 4", "rala", 2, 200, 304, 1, 64),
    Shape("detection, stride 8", "rala", 2, 100, 152, 2, 64),
    Shape("detection, stride 4", "mala", 2, 200, 304, 1, 64),
    Shape("detection, stride 8", "mala", 2, 100, 152, 2, 64),
    Shape("detection, stride 4", "l2", 2, 200, 304, 3, 32),
    # Single images.
    Shape("one image of 1024 pixels, stride 4", "rala", 1, 256, 256, 1, 64),
    Shape("one image of 4096 pixels, stride 8", "rala", 1, 512, 512, 2, 64),
    Shape("one image of 4096 pixels, stride 8", "mala", 1, 512, 512, 2, 64),
    Shape("one image of 4096 pixels, stride 8", "nala", 1, 512, 512, 2, 64),
    Shape("one image of 4096 pixels, stride 8", "lightnet", 1, 512, 512, 2, 64),
    Shape("plain", "elu", 64, 56, 56, 1, 64),
    Shape("plain", "relu", 64, 56, 56, 1, 64),
    Shape("pola_pvt_tiny stage 1", "pola", 64, 56, 56, 1, 64),
    Shape("pola_swin_tiny stage 1", "pola", 64, 56, 56, 3, 32),
    Shape("h_vittt_tiny stage 1, one of its states", "identity", 64, 56, 56, 2, 32),
)
DRY_SHAPES = (
    Shape("dry run", "rala", 1, 3, 5, 2, 8, True),
    Shape("dry run", "lightnet", 1, 5, 9, 1, 8),
    Shape("dry run", "mala", 1, 3, 5, 1, 8, True, True),
)

Attention = Callable[..., Tensor]  # q, k, v and, with an epilogue, gate and lepe


def tables(shape: Shape, device: torch.device, dtype: torch.dtype) -> ops.RotaryTables | None:
    """Position tables of the mechanism's kind, as layers make them for tokens of a type."""
    positions = ops.get_mechanism(shape.mechanism).positions
    if positions == "none":
        return None
    make = ops.lrpe_tables if positions == "cosine" else ops.rotary_tables
    of_tables = ops.table_dtype(torch.empty(0, device=device, dtype=dtype))
    return make(shape.height, shape.width, shape.dim, device, of_tables)


def rotate_transcribed(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) with tables for each token."""
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * cos + swapped * sin


def signs(x: Tensor) -> Tensor:
    """[relu(x); relu(-x)]."""
    return torch.cat((F.relu(x), F.relu(-x)), dim=-1)


def initial_powers(shape: Shape, device: torch.device) -> Tensor | None:
    """Powers of a mechanism that learns them, as its models have them at first."""
    if not ops.get_mechanism(shape.mechanism).takes_powers:
        return None
    return torch.full((shape.heads, shape.dim), 3.0, device=device)


def features_transcribed(
    mechanism: str, q: Tensor, k: Tensor, powers: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """phi(q) and phi(k), one call for each step."""
    if powers is not None:
        power = torch.cat((powers, powers), dim=-1)[:, None]
        return signs(q) ** power, signs(k) ** power
    if mechanism in ("rala", "mala", "elu"):
        return F.elu(q) + 1, F.elu(k) + 1
    if mechanism in ("l2", "relu"):
        return F.relu(q), F.relu(k)
    if mechanism == "nala":
        norm = q.norm(dim=-1, keepdim=True)
        power = 3 * (0.5 + torch.tanh(norm))
        return signs(q / norm) ** power, signs(k**3)
    if mechanism == "lightnet":
        return F.silu(q), torch.softmax(k, dim=2)
    return q, k


def transcription(
    shape: Shape,
    rotary: ops.RotaryTables | None,
    dtype: torch.dtype,
    powers: Tensor | None = None,
) -> Attention:
    """The mechanism step by step, one call for each, heads moved by copies, as scripts do.

    Written from the definitions in `vitlinear.ops.mechanisms`; sums are of the type of the inputs.
    """
    name, scale = shape.mechanism, shape.dim**-0.5
    if rotary is None:
        cos, sin = torch.ones(()), torch.zeros(())
    else:
        cos, sin = token_table(rotary).to(dtype).unbind(-1)
    if rotary is not None and name != "lightnet":
        # An angle for each pair of channels, and each half of the features.
        halves = 2 if name == "nala" else 1
        cos, sin = (t.repeat_interleave(2, dim=-1).repeat(1, halves) for t in (cos, sin))

    def encode(x: Tensor) -> Tensor:
        if rotary is None:
            return x
        if name == "lightnet":
            return torch.cat((x * cos, x * sin), dim=-1)
        return rotate_transcribed(x, sin, cos)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None, lepe: Tensor | None = None
    ) -> Tensor:
        q, k, v = (x.permute(0, 2, 1, 3).contiguous() for x in (q, k, v))
        n = q.shape[2]
        q, k = features_transcribed(name, q, k, powers)
        if name == "rala":
            query = q.mean(dim=2, keepdim=True)
            weights = (scale * query) @ k.transpose(-1, -2)
            k = k * torch.softmax(weights, dim=-1).transpose(-1, -2) * n
        z = q @ k.mean(dim=2, keepdim=True).transpose(-1, -2)
        q, k = encode(q), encode(k)
        if name == "lightnet":  # whose weights sum to one already
            out = q @ (k.transpose(-1, -2) @ v)
        else:
            out = q @ ((k.transpose(-1, -2) * n**-0.5) @ (v * n**-0.5))
        if name == "pola":
            opposite = torch.cat(q.chunk(2, dim=-1)[::-1], dim=-1)
            z_opposite = opposite @ k.mean(dim=2, keepdim=True).transpose(-1, -2)
            state = (k.transpose(-1, -2) * n**-0.5) @ (v * n**-0.5)
            half = v.shape[-1] // 2
            first = q @ state[..., :half] / (z + 1e-6)
            out = torch.cat((first, opposite @ state[..., half:] / (z_opposite + 1e-6)), dim=-1)
        elif name == "mala":
            z = z * scale
            out = out * scale * (1 + 1 / (z + 1e-6)) - z * v.mean(dim=2, keepdim=True)
        elif name == "inline":
            out = out * scale + (1 - scale * z) * v.mean(dim=2, keepdim=True)
        elif name == "l2":
            out = out * n / (z * n).clamp(min=100)
        elif name not in ("lightnet", "identity"):
            out = out / (z + 1e-6)
        out = out.permute(0, 2, 1, 3).contiguous()
        return out if gate is None or lepe is None else (out + lepe) * gate

    return attend


def softmax(backend: SDPBackend) -> Attention:
    """Softmax attention on one of PyTorch's kernels.

    Without the rotation of q and k, which SDPA does not fuse: the comparison favours softmax.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None, lepe: Tensor | None = None
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out if gate is None or lepe is None else (out + lepe) * gate

    return attend


def implementations(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Implementations to compare for a shape, by name."""
    rotary, powers = tables(shape, device, dtype), initial_powers(shape, device)

    def backend(name: str) -> Attention:
        def attend(
            q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None, lepe: Tensor | None = None
        ) -> Tensor:
            return ops.linear_attention(
                q,
                k,
                v,
                mechanism=shape.mechanism,
                rotary=rotary,
                lepe=lepe,
                gate=gate,
                powers=powers,
                backend=name,
            )

        return attend

    found: dict[str, Any] = {"triton": backend("triton"), "eager": backend("eager")}
    if shape.compare:
        found[COMPILED] = torch.compile(backend("eager"), dynamic=False)
        found["transcription"] = transcription(shape, rotary, dtype, powers)
        kernels = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
        for name in kernels if device.type == "cuda" else ("MATH",):
            found[f"SDPA {name.lower()}"] = softmax(SDPBackend.__members__[name])
    return found
