"""Where the tokens that a block sees stand in the image."""

from __future__ import annotations

import copy
from types import SimpleNamespace
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

    It keeps the model, not numbers nor the patch embedding: ``set_input_size`` changes those, and
    this may be exchanged.
    """

    def __init__(self, owner: nn.Module, dynamic: bool) -> None:
        """Keep the model.

        Args:
            owner: With a ``patch_embed`` that has a ``grid_size``.
            dynamic: Whether each call of the model may have a grid of its own.
        """
        self.owner: Any = owner
        self.dynamic = dynamic

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenMap:
        """A map of the copy of the model; of an attention alone, with the patch embedding alone."""
        if id(self.owner) in memo:
            owner = memo[id(self.owner)]
        else:
            owner = SimpleNamespace(patch_embed=copy.deepcopy(self.owner.patch_embed, memo))
        return TokenMap(owner, self.dynamic)

    def watch(self) -> None:
        """Have the patch embedding note the grid of each call, where it can change."""
        embed = self.owner.patch_embed
        if self.dynamic and not hasattr(embed, "size_note"):
            embed.size_note = SizeNote()
            embed.register_forward_hook(_pass_by)

    def size(self) -> tuple[int, int]:
        """Rows and columns of the map that is seen now.

        Raises:
            ValueError: The patch embedding was exchanged for one that notes nothing.
        """
        embed = self.owner.patch_embed
        if not self.dynamic:
            height, width = embed.grid_size
        elif hasattr(embed, "size_note"):
            height, width = embed.size_note.size
        else:
            raise ValueError(
                "patch_embed of a model of dynamic size was exchanged after replace_attention, and "
                "the map of the tokens is not known: exchange it before"
            )
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
    return TokenMap(owner, bool(getattr(owner, "dynamic_img_size", False)))
