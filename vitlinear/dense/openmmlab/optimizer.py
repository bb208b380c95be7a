"""Learning rates that fall from layer to layer of a backbone, for mmengine's optimizer wrappers."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from timm.models import group_parameters
from torch import nn

from vitlinear.errors import UserError
from vitlinear.registry import OPTIM_WRAPPER_CONSTRUCTORS

from ..backbone import MultiScaleBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's rules for parameters, and those that a timm model states about itself.

    ``paramwise_cfg`` takes what ``DefaultOptimWrapperConstructor`` takes (``custom_keys``,
    ``norm_decay_mult``, ``bias_decay_mult``, ...), and ``layer_decay`` (float, default 1): a weight
    of layer i out of L of the backbone's model, the stem being layer 0 and the last block L - 1,
    learns with ``layer_decay ** (L - i)`` times the rate that it would have. Layers are those of
    the model's ``group_matcher``, as in timm's ``--layer-decay``. Necks, heads, and a backbone's
    own norms and pyramid keep the full rate, as in BEiT (arXiv:2106.08254, section 3.1) and ViTDet
    (arXiv:2203.16527, appendix A).

    What the model's ``no_weight_decay()`` names is not decayed, unless one of ``custom_keys`` sets
    its ``decay_mult``.

    Example::

        optim_wrapper = dict(
            constructor="vitlinear.LayerDecayOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay=0.9, norm_decay_mult=0.0),
        )
    """

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        """Take the sections of a config.

        Raises:
            UserError: layer_decay is not in (0, 1], or there is no learning rate to scale.
        """
        # Never empty: mmengine takes that for no groups at all.
        rules = {"layer_decay": 1.0, **(paramwise_cfg or {})}
        super().__init__(optim_wrapper_cfg, rules)
        if not 0 < rules["layer_decay"] <= 1:
            raise UserError(f"layer_decay must be in (0, 1], got {rules['layer_decay']}")
        if self.base_lr is None:
            raise UserError("layer_decay scales the optimizer's lr: give optimizer=dict(lr=...)")

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", **kwargs: Any
    ) -> None:
        """Add a group for each weight of the module, as mmengine does, and then the model's rules.

        mmengine calls it for each part of the model, with its prefix; the rules come last.
        """
        super().add_params(params, module, prefix, **kwargs)
        if not prefix:
            groups = {id(group["params"][0]): group for group in params}
            for name, part in module.named_modules():
                if isinstance(part, MultiScaleBackbone):
                    self._add_rules(groups, part.model, f"{name}.model" if name else "model")

    def _add_rules(self, groups: dict[int, dict[str, Any]], model: nn.Module, name: str) -> None:
        decay, exempt = self.paramwise_cfg["layer_decay"], _no_weight_decay(model)
        layers = _layers(model) if decay < 1 else {}
        depth = max(layers.values(), default=-1) + 1
        for key, parameter in model.named_parameters():
            group = groups.get(id(parameter))
            if group is None:  # frozen
                continue
            if layers:
                group["lr"] = group.get("lr", self.base_lr) * decay ** (depth - layers[key])
            if key in exempt and "decay_mult" not in group:
                group["weight_decay"] = 0.0
        if layers:
            print_log(
                f"layer decay -- {name}: {depth} layers, the rate of the first times "
                f"{decay**depth:.4g}, of the last times {decay:.4g}",
                logger="current",
            )


def _layers(model: nn.Module) -> dict[str, int]:
    """The layer of each of a timm model's parameters, by its own rule."""
    if not hasattr(model, "group_matcher"):
        raise UserError(f"{type(model).__name__} does not say what its layers are: no layer_decay")
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)


def _no_weight_decay(model: nn.Module) -> set[str]:
    return set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
