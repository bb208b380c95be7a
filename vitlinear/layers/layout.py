"""How maps lie in memory where it matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Option of `torch.compile`: maps stay in the layout they have (docs/compile.md).
KEEP_LAYOUT: dict[str, Any] = {"layout_optimization": False}


def known_layout(x: Tensor) -> Tensor:
    """The map itself; while torch.onnx makes a program, a contiguous one.

    Programs of ONNX know no strides. Of a channels-last map torch.export asks whether there is more
    than one image. With an example of one, the answer ties the program to a batch of one, and
    torch.onnx writes that file without a word.
    """
    if torch.jit.is_scripting():
        return x
    else:  # noqa: RET505  TorchScript leaves out the branch not taken, but not what follows it
        return x.contiguous() if torch.onnx.is_in_onnx_export() else x


def known_strides(x: Tensor) -> Tensor:
    """The tensor itself; while torch.export makes a program, one in contiguous memory of its own.

    Of what flatten makes of a map whose sides are rounded down, torch.export takes a stride for the
    least of two numbers. It cannot prove which one that is, and refuses a range of sizes.
    """
    if torch.jit.is_scripting():
        return x
    else:  # noqa: RET505
        if not torch.compiler.is_exporting():
            return x
        return x.clone(memory_format=torch.contiguous_format)


def is_followed(size: int) -> bool:
    """Whether the older exporter to ONNX traces this size, a tensor then, for any other as well.

    Other users of traces, such as those that count operations, want the steps that this size takes.
    """
    if torch.jit.is_scripting():
        return False
    else:  # noqa: RET505
        return torch.onnx.is_in_onnx_export() and isinstance(size, Tensor)


def split_axis(x: Tensor, axis: int, sizes: list[int]) -> Tensor:
    """``x.unflatten(axis, sizes)``.

    Of what unflatten gives, the older exporter to ONNX takes all sizes for those of the example.

    Args:
        x: Any tensor.
        axis: Counted from the first, 0.
        sizes: What the axis becomes.
    """
    if torch.jit.is_scripting():
        return x.unflatten(axis, sizes)
    else:  # noqa: RET505
        if is_followed(x.shape[0]):
            return x.reshape([*x.shape[:axis], *sizes, *x.shape[axis + 1 :]])
        return x.unflatten(axis, sizes)
