"""The card of a weights file: a safetensors file that describes itself.

A weights file holds, besides the tensors, what it takes to use them (`Card`): validate and predict
need nothing else.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from vitlinear.errors import UserError, one_line
from vitlinear.files import write_atomically

from .read import read_metadata

CARD_KEY = "vitlinear"
IMAGE_MODES = {1: "L", 3: "RGB"}  # by channels, where nothing else is said


@dataclasses.dataclass(frozen=True)
class Card:
    """The description of a weights file, which is in it.

    Attributes:
        model: Name for ``timm.create_model``.
        model_kwargs: Its constructor arguments.
        num_classes: Width of the classifier.
        in_chans: Input channels.
        data_config: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``crop_mode``.
        image_mode: PIL mode of the input images; None where no mode is known for the channels.
        class_names: In label order, where known.
        dataset: Name of the data set, if it was not a folder.
        epoch: Epochs trained, counted from 1.
        metric: Name and value of the held-out metric.
        weights: ``model`` or ``ema`` (the moving average).
    """

    model: str
    model_kwargs: dict[str, Any]
    num_classes: int
    in_chans: int
    data_config: dict[str, Any]
    image_mode: str | None
    class_names: list[str] | None = None
    dataset: str | None = None
    epoch: int = 0
    metric: dict[str, float] = dataclasses.field(default_factory=dict)
    weights: str = "model"


def save_weights(
    path: Path,
    state_dict: Mapping[str, torch.Tensor],
    card: Card,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, card and more metadata to a safetensors file."""
    # clone: safetensors refuses tensors that share memory
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }
    text = json.dumps(dataclasses.asdict(card), sort_keys=True)
    metadata = {**(more or {}), "format": "pt", CARD_KEY: text}
    # Through bytes: the library's own writer makes files that only their owner can read.
    data = safetensors.torch.save(tensors, metadata=metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def read_card(path: Path) -> Card | None:
    """Read the card of a weights file, None if it is another program's.

    Raises:
        UserError: The file is missing, or is a damaged safetensors file.
    """
    return card_of(read_metadata(path), path)


def card_of(metadata: Mapping[str, str], path: Path) -> Card | None:
    """Parse the card in the metadata of a weights file, None if there is none.

    Raises:
        UserError: It is not understood.
    """
    text = metadata.get(CARD_KEY)
    try:
        return Card(**json.loads(text)) if text else None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint {path} describes itself in a way that this version cannot read "
            f"({one_line(error)[:200]})"
        ) from error
