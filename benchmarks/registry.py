"""What the GPU benchmark measures: attention calls of real models, and what is compared there.

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

# Tensors of the size of q that have to cross the memory bus: q, k, v, out, and q once more for a
# mean query; backward q, k, v, their gradients and that of out.
FORWARD_TENSORS = {"rala": 5}
BACKWARD_TENSORS = {"rala": 8}


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
    """

    where: str
    mechanism: str
    batch: int
    height: int
    width: int
    heads: int
    dim: int
    compare: bool = False

    @property
    def length(self) -> int:
        """N."""
        return self.height * self.width

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q in bfloat16."""
        return 2 * self.batch * self.length * self.heads * self.dim


SHAPES = (
    # Classification, 64 images of 224 pixels. The first rows are those that a bar is set for.
    Shape("ravlt_t stage 1", "rala", 64, 56, 56, 1, 64, True),
    Shape("mavit_t stage 1", "mala", 64, 56, 56, 1, 64, True),
    Shape("one image of 1024 pixels, stride 8, wide", "mala", 8, 128, 128, 4, 64, True),
    Shape("one image of 1024 pixels, stride 4, wide", "rala", 2, 256, 256, 4, 64, True),
    Shape("nalaformer_t stage 1", "nala", 64, 56, 56, 1, 64, True),
    Shape("l2vit_tiny stage 1", "l2", 64, 56, 56, 3, 32),
    Shape("lightnet", "lightnet", 64, 14, 14, 6, 64),
    Shape("inline_deit_tiny", "inline", 64, 14, 14, 3, 64, True),
    Shape("inline_swin_tiny stage 1", "inline", 4096, 7, 7, 3, 32, True),
    Shape("ravlt_t stage 2", "rala", 64, 28, 28, 2, 64),
    Shape("ravlt_t stage 3", "rala", 64, 14, 14, 4, 64, True),
    Shape("mavit_t stage 2", "mala", 64, 28, 28, 2, 64),
    Shape("mavit_t stage 3", "mala", 64, 14, 14, 4, 64),
    Shape("ravlt_t stage 4", "rala", 64, 7, 7, 8, 64, True),
    Shape("long", "mala", 8, 181, 181, 4, 64),
    # Dense prediction: two images of 800 x 1216 pixels.
    Shape("detection, stride 4", "rala", 2, 200, 304, 1, 64),
    Shape("detection, stride 8", "rala", 2, 100, 152, 2, 64),
    Shape("detection, stride 4", "mala", 2, 200, 304, 1, 64),
    Shape("detection, stride 4", "l2", 2, 200, 304, 3, 32),
    # Single images.
    Shape("one image of 1024 pixels, stride 4", "rala", 1, 256, 256, 1, 64),
    Shape("one image of 4096 pixels, stride 8", "rala", 1, 512, 512, 2, 64),
    Shape("one image of 4096 pixels, stride 8", "mala", 1, 512, 512, 2, 64),
    Shape("one image of 4096 pixels, stride 8", "nala", 1, 512, 512, 2, 64),
    Shape("one image of 4096 pixels, stride 8", "lightnet", 1, 512, 512, 2, 64),
    Shape("plain", "elu", 64, 56, 56, 1, 64),
    Shape("plain", "relu", 64, 56, 56, 1, 64),
)
DRY_SHAPES = (
    Shape("dry run", "rala", 1, 3, 5, 2, 8, True),
    Shape("dry run", "lightnet", 1, 5, 9, 1, 8),
)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def tables(shape: Shape, device: torch.device) -> ops.RotaryTables:
    """Position tables of the mechanism's kind."""
    cosine = ops.get_mechanism(shape.mechanism).positions == "cosine"
    make = ops.lrpe_tables if cosine else ops.rotary_tables
    return make(shape.height, shape.width, shape.dim, device)


def rotate_transcribed(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) with tables for each token."""
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * cos + swapped * sin


def transcription(shape: Shape, rotary: ops.RotaryTables, dtype: torch.dtype) -> Attention | None:
    """The mechanism step by step, one call for each, heads moved by copies, as scripts do.

    For the elu-based mechanisms, whose definitions are short enough to be written out here.
    """
    if shape.mechanism not in ("rala", "mala", "elu"):
        return None
    table = token_table(rotary)
    cos, sin = (t.repeat_interleave(2, dim=-1).to(dtype) for t in table.unbind(-1))
    scale = shape.dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(0, 2, 1, 3).contiguous() for x in (q, k, v))
        n = q.shape[2]
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if shape.mechanism == "rala":
            query = q.mean(dim=2, keepdim=True)
            weights = (scale * query) @ k.transpose(-1, -2)
            k = k * torch.softmax(weights, dim=-1).transpose(-1, -2) * n
        z = q @ k.mean(dim=2, keepdim=True).transpose(-1, -2)
        q, k = rotate_transcribed(q, sin, cos), rotate_transcribed(k, sin, cos)
        out = q @ ((k.transpose(-1, -2) * n**-0.5) @ (v * n**-0.5))
        if shape.mechanism == "mala":
            z = z * scale
            out = out * scale * (1 + 1 / (z + 1e-6)) - z * v.mean(dim=2, keepdim=True)
        else:
            out = out / (z + 1e-6)
        return out.permute(0, 2, 1, 3).contiguous()

    return attend


def softmax(backend: SDPBackend) -> Attention:
    """Softmax attention on one of PyTorch's kernels.

    Without the rotation of q and k, which SDPA does not fuse: the comparison favours softmax.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend


def implementations(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What runs for a shape, by name; None where it does not exist for the mechanism."""
    rotary = tables(shape, device)

    def backend(name: str) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.linear_attention(q, k, v, shape.mechanism, rotary, backend=name)

        return attend

    found: dict[str, Any] = {"triton": backend("triton"), "eager": backend("eager")}
    if shape.compare:
        found["compiled eager"] = torch.compile(backend("eager"), dynamic=False)
        found["transcription"] = transcription(shape, rotary, dtype)
        kernels = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
        for name in kernels if device.type == "cuda" else ("MATH",):
            found[f"SDPA {name.lower()}"] = softmax(SDPBackend.__members__[name])
    return found
