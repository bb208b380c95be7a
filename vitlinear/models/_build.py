"""The builder that every family makes its models with."""

from pathlib import Path
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.checkpoints.download import DownloadError, ensure_downloaded
from vitlinear.checkpoints.read import CheckpointError, read_checkpoint
from vitlinear.facts import published_files

Model = TypeVar("Model", bound=nn.Module)


def imagenet_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """The part of a ``pretrained_cfg`` that is common to all, for square images of this side.

    Evaluation as all families publish it: resize to 256/224 of the side, centre crop, bicubic.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **kwargs,
    }


def build_model(model_cls: type[Model], name: str, pretrained: bool, **kwargs: Any) -> Model:
    """timm's ``build_model_with_cfg`` with our reader, filter, and downloads that are checked.

    Args:
        model_cls: Class of the model, with a ``feature_cfg`` for ``features_only=True``.
        name: Registered name.
        pretrained: Load the weights that the ``pretrained_cfg`` names.
        **kwargs: For timm and the model's constructor.

    Raises:
        DownloadError: The weights could not be fetched whole; see `ensure_downloaded`.
        CheckpointError: The file cannot be read, or holds no weights of the model. A ValueError.
        RuntimeError: They do not fit the model.
        ValueError: An ``output_stride`` is asked for, which is a word of dilated convolutions.
    """
    if kwargs.pop("output_stride", None) not in (None, 32):  # 32: what callers give by default
        raise ValueError(
            f"{name} has no output_stride: its strides are those of its stages, and its last map "
            "stays as coarse as it is; leave output_stride out, and take a decoder that joins maps "
            "of several strides, such as an FPN or UperNet"
        )
    kwargs = {"feature_cfg": dict(model_cls.feature_cfg), **kwargs}  # type: ignore[attr-defined]
    path = _weights_file(name, kwargs) if pretrained else None
    if path is None:
        return build_model_with_cfg(
            model_cls, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
        )

    def read(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
        checkpoint = read_checkpoint(path)
        try:
            return checkpoint_filter_fn(checkpoint, model)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error

    # timm would read the file in its own way. It takes a state dict before any file, and copies it
    # with the configuration: so it gets the name, and the filter above makes the weights of it.
    overlay = {**(kwargs.pop("pretrained_cfg_overlay", None) or {}), "state_dict": {"file": path}}
    model = build_model_with_cfg(
        model_cls,
        name,
        pretrained,
        pretrained_filter_fn=read,
        pretrained_cfg_overlay=overlay,
        **kwargs,
    )
    for module in model.modules():
        if isinstance(cfg := getattr(module, "pretrained_cfg", None), dict):
            cfg.pop("state_dict", None)
    return model


def _weights_file(name: str, kwargs: dict[str, Any]) -> Path | None:
    """The file on this machine to read, fetched if need be; None where timm finds the weights."""
    cfg = resolve_pretrained_cfg(
        name,
        pretrained_cfg=kwargs.get("pretrained_cfg"),
        pretrained_cfg_overlay=kwargs.get("pretrained_cfg_overlay"),
    )
    row = next((row for row in published_files(name) if row.task == "classification"), None)
    if row and not (row.wired or cfg.has_weights or cfg.state_dict):
        raise DownloadError(
            f"the weights of {name} are at {row.location}, which timm cannot fetch: {row.note}"
        )
    # Other sources, such as a whole hub repository of somebody's, are timm's alone.
    if cfg.source not in (None, "timm") or cfg.custom_load or cfg.state_dict:
        return None
    if cfg.file:
        return Path(cfg.file)
    return ensure_downloaded(cfg.to_dict(), kwargs.get("cache_dir"))
