"""Initial values of weights: normally distributed, without outliers."""

import torch
from timm.layers import trunc_normal_

LIMIT = 6.0  # standard deviations; float32 numbers of `trunc_normal_` within its range end at 5.3


def init_normal_(weight: torch.Tensor, std: float) -> torch.Tensor:
    """Fill `weight` in place from a normal distribution around 0, as timm's `trunc_normal_` does.

    Same numbers from the same generator, but none beyond 6 `std`: one in 2**24 of
    `trunc_normal_`'s float32 numbers is the end of its range, -2, which is 100 of the usual `std`
    of 0.02. A model of 25 million weights holds one or two such, which 8-bit weights do not
    survive. Types narrower than float32, in which one in 2**8 to 2**11 would be such, are drawn
    in float32.

    Args:
        weight: Values to replace, of any shape and floating-point type.
        std: Standard deviation.

    Returns:
        `weight`.
    """
    with torch.no_grad():
        if weight.dtype.itemsize < 4:
            return weight.copy_(init_normal_(torch.empty_like(weight, dtype=torch.float32), std))
        return trunc_normal_(weight, std=std).clamp_(-LIMIT * std, LIMIT * std)
