"""Everything that vitlinear takes from timm's private modules, in one place.

timm gives no promise about modules whose names begin with an underscore, yet every timm model is
built from them. An upgrade of timm that moves one breaks this file and no other.
"""

from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_module
from timm.models._hub import generate_readme
from timm.models._input import update_model_input_size

__all__ = [
    "feature_take_indices",
    "generate_readme",
    "register_notrace_module",
    "update_model_input_size",
]
