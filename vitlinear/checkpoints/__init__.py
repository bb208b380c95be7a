"""Published checkpoints: their formats, and the way from the authors' keys to ours."""

from .filter import checkpoint_filter_fn
from .mappings import MAPPINGS, KeyMapping, find_mapping
from .unwrap import unwrap_state_dict

__all__ = [
    "MAPPINGS",
    "KeyMapping",
    "checkpoint_filter_fn",
    "find_mapping",
    "unwrap_state_dict",
]
