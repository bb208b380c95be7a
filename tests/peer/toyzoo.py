"""Two tiny models for the peer harness's own test: one keeps timm's contract, one breaks it.

``test_toy_pyramid`` is about the smallest model that passes; ``toy_sloppy`` swallows unknown
arguments and leaves its head behind when it is pruned, two mistakes that real models make.
"""

# No `from __future__ import annotations` in a model file: torch.fx copies annotations of forward to
# the code it generates, and TorchScript cannot read them there once they are strings.

from typing import Any

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import nn

__all__ = ["ToyPyramid"]


class ToyPyramid(nn.Module):
    """Four stages, each one strided convolution, behind timm's usual interface."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        dims: tuple[int, ...] = (8, 12, 16, 24),
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.grad_checkpointing = False
        self.stem = nn.Conv2d(in_chans, dims[0], 3, stride=2, padding=1, **dd)
        self.stages = nn.Sequential()
        self.feature_info = []
        for i, dim in enumerate(dims):
            before = dims[max(i - 1, 0)]
            self.stages.append(
                nn.Sequential(nn.Conv2d(before, dim, 3, stride=2, padding=1, **dd), nn.GELU())
            )
            self.feature_info.append(
                {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"}
            )
        self.norm: nn.Module = nn.GroupNorm(1, dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        # A head from scratch: one that had no classifier has forgotten its device and dtype.
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        self.head = ClassifierHead(
            self.num_features, num_classes, pool, self.drop_rate, **get_device_dtype(self)
        ).train(self.training)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        take, last = feature_take_indices(len(self.stages), indices)
        taps = []
        x = self.stem(x)
        stages = self.stages[: last + 1] if stop_early else self.stages
        final = len(self.feature_info) - 1
        for i, stage in enumerate(stages):
            x = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
            if i in take:
                taps.append(self.norm(x) if norm and i == final else x)
            if i == final:
                x = self.norm(x)
        if intermediates_only:
            return taps
        return x, taps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened or prune_norm:
            self.norm = nn.Identity()
        if shortened or prune_head:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.head = ClassifierHead(
                self.num_features, 0, self.head.global_pool.pool_type, **get_device_dtype(self)
            ).train(self.training)
            self.num_classes = 0
        return take

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(stage, x)
            else:
                x = stage(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class ToySloppy(ToyPyramid):
    """Breaks two rules of the contract and keeps the others."""

    def __init__(self, not_a_model_arg: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        head, width = self.head, self.head_hidden_size
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.head, self.head_hidden_size = head, width
        return take


_CFG = {
    "input_size": (3, 96, 96),
    "pool_size": (3, 3),
    "first_conv": "stem",
    "classifier": "head.fc",
    "num_classes": 1000,
}
default_cfgs = generate_default_cfgs(
    {"test_toy_pyramid.untrained": _CFG, "toy_sloppy.untrained": _CFG}
)


def _create(cls: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def test_toy_pyramid(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create(ToyPyramid, "test_toy_pyramid", pretrained, **kwargs)


@register_model
def toy_sloppy(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create(ToySloppy, "toy_sloppy", pretrained, **kwargs)
