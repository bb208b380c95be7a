"""A registered model as a backbone of mmdet and mmseg: ``dict(type='vitlinear.Backbone', ...)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule, PretrainedInit

from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.errors import UserError
from vitlinear.registry import MODELS

InitConfig = dict[str, Any]


@MODELS.register_module()
class Backbone(MultiScaleBackbone, BaseModule):
    """`MultiScaleBackbone` with mmengine's way of initialising it.

    Example::

        backbone=dict(
            type="vitlinear.Backbone",
            model="ravlt_s",
            out_norms=True,
            drop_path_rate=0.15,
            init_cfg=dict(type="Pretrained", checkpoint="RAVLT_S.pth"),
        )
    """

    def __init__(
        self,
        model: str,
        *args: Any,
        init_cfg: InitConfig | Sequence[InitConfig] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the backbone; its weights are the model's own initial ones.

        Args:
            model: Name in timm's registry, with or without a tag.
            *args: Of `MultiScaleBackbone`.
            init_cfg: As mmengine has it. ``dict(type='Pretrained', checkpoint=FILE)`` loads a file
                of weights, the authors' or ours, of a classifier, or of the stages of a detector,
                when the detector initialises its weights: not where it goes on from a checkpoint
                of its own.
            **kwargs: Of `MultiScaleBackbone`, ``pretrained=True`` among them, which fetches the
                weights that timm's registry names.

        Raises:
            UserError: As `MultiScaleBackbone` does; or ``init_cfg`` besides ``pretrained``.
        """
        super().__init__(model, *args, **kwargs)
        self._arguments = (model, *args), kwargs
        self.init_cfg = init_cfg
        if kwargs.get("pretrained") and self._checkpoints():
            raise UserError("give pretrained=True or init_cfg=dict(type='Pretrained'), not both")
        # The parts have drawn their weights, or loaded them: mmengine is not to draw them again.
        for part in self.children():
            part.is_init = True

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; mmengine applies its other rules first.

        Raises:
            CheckpointError: The file cannot be used, or does not fit the model.
        """
        given, checkpoints = self.init_cfg, self._checkpoints()
        self.init_cfg = [rule for rule in _rules(given) if rule not in checkpoints] or None
        try:
            super().init_weights()
        finally:
            self.init_cfg = given
        for rule in checkpoints:
            args, kwargs = self._arguments
            loaded = MultiScaleBackbone(*args, **kwargs, checkpoint_path=rule["checkpoint"])
            self.model.load_state_dict(loaded.model.state_dict())

    def _checkpoints(self) -> list[InitConfig]:
        kinds = ("Pretrained", PretrainedInit)
        return [rule for rule in _rules(self.init_cfg) if rule["type"] in kinds]


def _rules(init_cfg: InitConfig | Sequence[InitConfig] | None) -> list[InitConfig]:
    return [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or ())
