"""A frozen model that teaches another: its weights, and the images that it is shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.task import DistillationTeacher
from torch import nn
from torch.nn import functional as F

from vitlinear.checkpoints.card import read_card
from vitlinear.checkpoints.load import MisfitError, load_model
from vitlinear.create import Preprocessing, build_model, data_config
from vitlinear.data.class_names import check_same_classes
from vitlinear.errors import UserError


class Teacher(DistillationTeacher):
    """A frozen model that gets the student's images in its own normalisation and size.

    A teacher that is built for one size gets images of that size; any other sees the student's.

    Args:
        model: The teacher, with its weights.
        config: How its images are made.
        student: Likewise for the student, whose batches it will be given.
        device: Where it runs.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        config: Preprocessing,
        student: Preprocessing,
        device: torch.device,
    ) -> None:
        super().__init__(model.to(device).requires_grad_(False), device=device)
        fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
        self.size = config.input_size[1:] if fixed else None

        def per_channel(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)

        std = per_channel(config.std)
        scale = per_channel(student.std) / std
        shift = (per_channel(student.mean) - per_channel(config.mean)) / std
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.renormalises = (config.mean, config.std) != (student.mean, student.std)

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode."""
        return super().train(False)

    def normalize_input(
        self, input: torch.Tensor, student_mean: Any = None, student_std: Any = None
    ) -> torch.Tensor:
        """Returns the images [B, C, H, W] as the teacher wants them.

        timm's tasks pass the statistics of the student's pretrained weights, which are not those
        of its batches where flags or the data set give others; they are not used.
        """
        if self.renormalises:
            input = input * self.scale + self.shift
        if self.size is not None and tuple(input.shape[-2:]) != self.size:
            input = F.interpolate(input, self.size, mode="bicubic", antialias=True)
        return input


def make_teacher(
    name: str | None,
    checkpoint: str | None,
    student: nn.Module,
    config: Preprocessing,
    class_names: Sequence[str] | None,
    device: torch.device,
    *,
    logits: bool,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Teacher:
    """Builds a teacher.

    Args:
        name: Model, with its published weights unless there is a checkpoint.
        checkpoint: File of its weights, or None.
        student: The model that it teaches.
        config: How the student's images are made.
        class_names: Of the data, in label order, where known.
        device: Where it runs.
        logits: Whether its logits are learnt, so that its classes must be the data's.
        memory_format: Of its weights.

    Raises:
        UserError: There are no such weights, or its classes or channels are not the student's.
    """
    num_classes, in_chans = int(student.num_classes), config.input_size[0]  # type: ignore
    if checkpoint:
        card = read_card(Path(checkpoint))
        if card is None and name is None:
            raise UserError(
                f"--kd-checkpoint {checkpoint} does not say which model it is: give --kd-model-name"
            )
        # files that do not describe themselves are taken to be of the student's classes
        shape: dict[str, Any] = {} if card else {"num_classes": num_classes, "in_chans": in_chans}
        try:
            model, card = load_model(checkpoint, model=name, **shape)
        except MisfitError as error:
            raise UserError(
                f"the teacher's {error.difference}; give its --kd-model-name, and weights for the "
                f"{num_classes} classes of the data"
            ) from error
    else:
        assert name is not None
        model, card = build_model(name, pretrained=True, in_chans=in_chans), None
    shown = checkpoint or name
    own = card.data_config if card else data_config(model, {})
    if own.input_size[0] != in_chans:
        raise UserError(
            f"the teacher {shown} takes {own.input_size[0]} channels, the student {in_chans}"
        )
    if logits and model.num_classes != num_classes:
        raise UserError(
            f"the teacher {shown} knows {model.num_classes} classes, the student {num_classes}: "
            "train it on this data first and give its weights as --kd-checkpoint, or use "
            "--kd-distill-type feature"
        )
    if logits and card:
        check_same_classes(card.class_names, class_names, f"the teacher {shown}", "the data")
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
    return Teacher(model, own, config, device)
