"""Forward hooks of modules, which calls of anything but the module itself would pass by."""

from __future__ import annotations

import torch.nn.modules.module as torch_module
from torch import nn


def has_forward_hooks(*modules: nn.Module) -> bool:
    """Whether forward hooks run when one of these modules is called, its own or those of all."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)
