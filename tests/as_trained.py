"""Models as training leaves them: a wrong place in a table of ones would not show."""

from typing import Any

import timm
import torch
from torch import nn


def make(name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
    """A model in evaluation, with everything away from its initial value."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model
