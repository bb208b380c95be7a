"""How every family makes its models."""

from collections.abc import Callable
from typing import Any, TypeVar

from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from ..checkpoints import checkpoint_filter_fn
from ..checkpoints.download import DownloadError, ensure_downloaded
from ..checkpoints.published import published_files

Model = TypeVar("Model", bound=nn.Module)


def build_model(
    model_cls: Callable[..., Model], name: str, pretrained: bool, **kwargs: Any
) -> Model:
    """timm's ``build_model_with_cfg`` with our checkpoint filter, and downloads that are checked.

    Args:
        model_cls: Class of the model.
        name: Registered name.
        pretrained: Load the weights that the ``pretrained_cfg`` names.
        **kwargs: For timm and the model's constructor.

    Raises:
        DownloadError: The weights could not be fetched whole; see `ensure_downloaded`.
        RuntimeError: They do not fit the model.
    """
    if pretrained:
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
        if cfg.source in (None, "timm"):
            ensure_downloaded(cfg.to_dict(), kwargs.get("cache_dir"))
    return build_model_with_cfg(
        model_cls, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )
