"""Everything that vitlinear takes from timm's private modules, in one place.

timm gives no promise about modules whose names begin with an underscore, nor about what files of
models do not list in ``__all__``, yet every timm model is built from them. An upgrade of timm that
moves one breaks this file and no other.
"""

from timm.layers import Attention, AttentionRope, PatchDropout, PatchDropoutWithIndices
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_module
from timm.models._hub import generate_readme
from timm.models._input import update_model_args, update_model_input_size
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaAttention
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention, VisionTransformerRelPos
from timm.models.vision_transformer_sam import Attention as SamAttention

__all__ = [
    "Attention",
    "AttentionRope",
    "Beit",
    "BeitAttention",
    "Eva",
    "EvaAttention",
    "NaFlexVit",
    "PatchDropout",
    "PatchDropoutWithIndices",
    "RelPosAttention",
    "SamAttention",
    "SwinAttention",
    "VisionTransformer",
    "VisionTransformerRelPos",
    "feature_take_indices",
    "generate_readme",
    "register_notrace_module",
    "update_model_args",
    "update_model_input_size",
]
