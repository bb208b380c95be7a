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
    register_notrace_module,
)

# Tokens of these run row by row over the grid of `patch_embed`, after those that stand nowhere.
ROW_BY_ROW = (VisionTransformer, Eva, Beit, VisionTransformerRelPos)


@register_notrace_module  # a step of its own to torch.fx, so that it runs where models were traced
class SizeNote(nn.Module):
    """Notes rows and columns of the maps that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.size = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C], as it came."""
        self.size = (x.shape[1], x.shape[2])
        return x


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
        self.patch_embed: Any = patch_embed
        self.dynamic = dynamic

    def watch(self) -> None:
        """Have the patch embedding note the grid of each call, where it can change."""
        if self.dynamic and not hasattr(self.patch_embed, "size_note"):
            self.patch_embed.size_note = SizeNote()
            self.patch_embed.register_forward_hook(_pass_by)

    def size(self) -> tuple[int, int]:
        """Rows and columns of the map that is seen now."""
        embed = self.patch_embed
        height, width = embed.size_note.size if self.dynamic else embed.grid_size
        return height, width


def _pass_by(patch_embed: Any, _: Any, output: Tensor) -> Tensor:
    """Forward hook: maps [B, H, W, C] pass the note."""
    noted: Tensor = patch_embed.size_note(output)
    return noted


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
