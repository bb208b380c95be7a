"""Where the tokens that a block sees stand in the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitlinear._timm import (
    Beit,
    Eva,
    PatchDropout,
    PatchDropoutWithIndices,
    VisionTransformer,
    VisionTransformerRelPos,
)

# Tokens of these run row by row over the grid of `patch_embed`, after those that stand nowhere.
ROW_BY_ROW = (VisionTransformer, Eva, Beit, VisionTransformerRelPos)


class TokenMap:
    """Rows and columns of the map of tokens, as the patch embedding of a model knows them.

    It keeps the module, not numbers: ``set_input_size`` changes them, and a copy of the model has a
    patch embedding of its own.
    """

    def __init__(self, patch_embed: nn.Module, dynamic: bool) -> None:
        """Keep the patch embedding.

        Args:
            patch_embed: With a ``grid_size``.
            dynamic: Whether each call of the model may have a grid of its own.
        """
        self.patch_embed = patch_embed
        self.dynamic = dynamic

    def watch(self) -> None:
        """Have the patch embedding note the grid of each call, where it can change."""
        hooks = self.patch_embed._forward_hooks.values()
        if self.dynamic and _note_size not in hooks:
            self.patch_embed.register_forward_hook(_note_size)

    def size(self) -> tuple[int, int]:
        """Rows and columns of the map that is seen now."""
        embed: Any = self.patch_embed
        height, width = embed.seen_size if self.dynamic else embed.grid_size
        return height, width


def _note_size(patch_embed: Any, _: Any, output: Tensor) -> None:
    """Forward hook: keep rows and columns of maps [B, H, W, C]."""
    patch_embed.seen_size = (output.shape[1], output.shape[2])


def token_map(owner: Any) -> TokenMap:
    """The map of the tokens of a model.

    Args:
        owner: The model that holds the blocks.

    Raises:
        ValueError: The tokens stand on no grid that is known; one line says why.
    """
    name = type(owner).__name__
    if not isinstance(owner, ROW_BY_ROW):
        raise ValueError(f"needs the map of the tokens, which is not known of {name}")
    if isinstance(getattr(owner, "patch_drop", None), (PatchDropout, PatchDropoutWithIndices)):
        raise ValueError("needs the map of the tokens, and patch dropout leaves none of it")
    if getattr(owner.patch_embed, "grid_size", None) is None:
        raise ValueError("needs the map of the tokens, which its patch embedding does not know")
    return TokenMap(owner.patch_embed, bool(getattr(owner, "dynamic_img_size", False)))
