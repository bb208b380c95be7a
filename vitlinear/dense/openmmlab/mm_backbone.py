"""A registered model as a backbone of mmdet and mmseg: ``dict(type='vitlinear.Backbone', ...)``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor

from vitlinear.checkpoints.card import read_card
from vitlinear.checkpoints.load import misfit, notice_of_other_model
from vitlinear.checkpoints.read import CheckpointError
from vitlinear.errors import Notice, UserError
from vitlinear.registry import MODELS

from ..backbone import MultiScaleBackbone
from .checks import WEB
from .reading import fetch

Rule = dict[str, Any]


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
        init_cfg: Rule | Sequence[Rule] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the backbone; its weights are the model's own initial ones.

        Args:
            model: Name in timm's registry, with or without a tag.
            *args: Of `MultiScaleBackbone`.
            init_cfg: As mmengine has it. ``dict(type='Pretrained', checkpoint=FILE)`` loads a file
                of weights, which may be an address of http or https, the authors' or ours, of a
                classifier, or of the stages of a detector, when the detector initialises its
                weights: not where it goes on from a checkpoint of its own.
            **kwargs: Of `MultiScaleBackbone`, ``pretrained=True`` among them, which fetches the
                weights that timm's registry names.

        Raises:
            UserError: As `MultiScaleBackbone` does; or ``init_cfg`` besides ``pretrained``.
        """
        if kwargs.get("pretrained") and _split(init_cfg)[0]:
            raise UserError("give pretrained=True or init_cfg=dict(type='Pretrained'), not both")
        super().__init__(model, *args, **kwargs)
        self._arguments = (model, *args), kwargs
        self.init_cfg = init_cfg
        # The parts have drawn their weights, or loaded them: mmengine is not to draw them again.
        for part in self.children():
            part.is_init = True

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; mmengine applies its other rules first.

        Raises:
            CheckpointError: The file cannot be used, or does not fit the model.
        """
        given = self.init_cfg
        checkpoints, self.init_cfg = _split(given)
        try:
            super().init_weights()
        finally:
            self.init_cfg = given
        for checkpoint in map(_local, checkpoints):
            args, kwargs = self._arguments
            with warnings.catch_warnings():  # of what is told below, with more knowledge
                warnings.simplefilter("ignore", Notice)
                loaded = MultiScaleBackbone(*args, **kwargs, checkpoint_path=checkpoint)
            weights = loaded.model.state_dict()
            card, name = read_card(Path(checkpoint)), args[0].partition(".")[0]
            if card is not None:  # whose arguments this model was made without
                notice_of_other_model(Path(checkpoint), card, name, kwargs)
            if difference := misfit(self.model.state_dict(), weights):
                raise CheckpointError(
                    f"checkpoint {checkpoint} is of a model that was built otherwise: "
                    f"{difference}; give its arguments in the backbone's section"
                )
            self.model.load_state_dict(weights)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, in_chans, H, W] -> maps [B, C_i, H_i, W_i], contiguous.

        Norms over channels, and convolutions after them, leave tensors in the order of channels
        last. mmcv's operators, RoIAlign among them, read any tensor as if it were contiguous, and
        give wrong values without a word for one that is not.
        """
        return tuple(level.contiguous() for level in super().forward(images))


def _local(checkpoint: str) -> str:
    """The file of weights, which is fetched if it has an address.

    Raises:
        CheckpointError: It cannot be fetched.
        UserError: Its address is of another kind than http and https.
    """
    if "://" not in checkpoint:
        return checkpoint
    if checkpoint.partition("://")[0] not in WEB:
        raise UserError(f"cannot fetch {checkpoint}: give a file, or an address of http or https")
    return str(fetch(checkpoint))


def _split(
    init_cfg: Rule | Sequence[Rule] | None,
) -> tuple[list[str], list[Rule]]:
    """The files of weights that a config names, and its other rules."""
    rules = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or ())
    files = [rule for rule in rules if rule["type"] in ("Pretrained", PretrainedInit)]
    return [rule["checkpoint"] for rule in files], [rule for rule in rules if rule not in files]
