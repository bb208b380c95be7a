"""Published checkpoints: their formats, and the way from the authors' keys to ours."""

from .pyramid import convert_pyramid, is_upstream_pyramid
from .unwrap import unwrap_state_dict

__all__ = ["convert_pyramid", "is_upstream_pyramid", "unwrap_state_dict"]
