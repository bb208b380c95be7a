"""Published checkpoints: their formats, and the way from the authors' keys to ours."""

from .filter import checkpoint_filter_fn
from .pyramid import convert_pyramid, is_upstream_pyramid
from .unwrap import unwrap_state_dict

__all__ = [
    "checkpoint_filter_fn",
    "convert_pyramid",
    "is_upstream_pyramid",
    "unwrap_state_dict",
]
