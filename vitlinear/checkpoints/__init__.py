"""Published checkpoints: their formats, and the way from the authors' keys to ours."""

from .mappings import MAPPINGS, KeyMapping, find_mapping
from .translate import checkpoint_filter_fn
from .unwrap import unwrap_state_dict

__all__ = [
    "MAPPINGS",
    "KeyMapping",
    "checkpoint_filter_fn",
    "find_mapping",
    "unwrap_state_dict",
]
