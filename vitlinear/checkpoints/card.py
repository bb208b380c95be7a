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

from vitlinear.create import Preprocessing
from vitlinear.errors import one_line
from vitlinear.files import write_atomically

from .read import CheckpointError, read_metadata

CARD_KEY = "vitlinear"
# Fields of timm's configuration of weights that hold for the registry's, and not for a file's.
OF_OTHER_WEIGHTS = (
    "test_input_size", "test_crop_pct", "pool_size", "test_pool_size", "label_descriptions",
    "label_offset", "license",
)  # fmt: skip
IMAGE_MODES = {1: "L", 3: "RGB"}  # by channels, where nothing else is said


@dataclasses.dataclass(frozen=True)
class Card:
    """The description of a weights file, which is in it.

    Attributes:
        model: Name for ``timm.create_model``.
        model_kwargs: Its constructor arguments.
        num_classes: Width of the classifier.
        in_chans: Input channels.
        data_config: How images become its input.
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
    data_config: Preprocessing
    image_mode: str | None
    class_names: list[str] | None = None
    dataset: str | None = None
    epoch: int = 0
    metric: dict[str, float] = dataclasses.field(default_factory=dict)
    weights: str = "model"

    def backbone_args(self) -> dict[str, Any]:
        """Arguments of ``timm.create_model`` for the model without its classifier."""
        return {"in_chans": self.in_chans, **self.model_kwargs}

    def pretrained_cfg(self) -> dict[str, Any]:
        """The file's classes and input in the fields of timm's ``pretrained_cfg``.

        Fields that say something about the registry's weights of the model are None.
        """
        names = self.class_names
        return {
            "num_classes": self.num_classes,
            "label_names": tuple(names) if names else None,
            **self.data_config.as_dict(),
            **dict.fromkeys(OF_OTHER_WEIGHTS),
        }


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
        CheckpointError: The file is missing, or is a damaged safetensors file.
    """
    return card_of(read_metadata(path), path)


def card_of(metadata: Mapping[str, str], path: Path) -> Card | None:
    """Parse the card in the metadata of a weights file, None if there is none.

    Raises:
        CheckpointError: It is not understood.
    """
    text = metadata.get(CARD_KEY)
    if not text:
        return None
    try:
        values = json.loads(text)
        return Card(**{**values, "data_config": Preprocessing.of(values["data_config"])})
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} describes itself in a way that this version cannot read "
            f"({one_line(error)[:200]})"
        ) from error
