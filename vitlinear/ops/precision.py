"""The precision of sums, and of float32 products on GPUs, as PyTorch's settings have it."""

from __future__ import annotations

import torch

from . import gpu


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over tokens are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.compiler.assume_constant_result
def takes_tf32() -> bool:
    """Whether float32 products may be in TF32.

    PyTorch has two settings, and the getter of the older one raises an error where the newer one
    says something that it has no word for.
    """
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is None:  # PyTorch 2.8
        return torch.get_float32_matmul_precision() != "highest"
    return bool(newer == "tf32")


def in_tf32(dtype: torch.dtype, device: str) -> bool:
    """Whether products of a type are in TF32 on a type of device."""
    return dtype is torch.float32 and device in gpu.DEVICES and takes_tf32()
