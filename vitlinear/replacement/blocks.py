"""The attentions of a model in timm's order of blocks, and which of them are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from .attentions import ReplacedAttention
from .kinds import is_attention

# The block of `blocks.3.attn` and of `layers.0.blocks.1.attn`; others are the parent module.
_BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+(?=\.)")
_SLICE = re.compile(r"(-?\d*):(-?\d*)(?::(-?\d*))?")


class Place(NamedTuple):
    """One attention of a model.

    Attributes:
        block: Number of its block; blocks that hold several give them the same.
        name: Path of the module.
        module: The attention.
        owner: The model that holds the block: of the modules that hold the attention, the innermost
            that embeds patches, or the outermost.
    """

    block: int
    name: str
    module: nn.Module
    owner: nn.Module


def find_attentions(model: nn.Module) -> list[Place]:
    """The attentions of a model between tokens, in timm's order of blocks.

    Attentions inside of others, and poolings before a classifier, are none of their own. Blocks
    with one attention in common, and places with one block in common, each count. A second name of
    the same row of blocks, as wrappers give it, does not.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}  # of each attention, the block
    for name, module in modules.items():
        if not (is_attention(module) or isinstance(module, ReplacedAttention)):
            continue
        if "" in found or any(name.startswith(f"{other}.") for other in found):
            continue
        match = _BLOCK.match(f"{name}.")
        found[name] = match.group() if match else name.rpartition(".")[0]

    def owner_of(name: str) -> nn.Module | None:
        parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)] + [""]
        owners = (modules[parent] for parent in parents)
        return next((module for module in owners if embeds_patches(module)), None)

    rows: dict[int, str] = {}  # of each row of blocks, the name that tells the model it is of
    for block in found.values():
        row = block.rpartition(".")[0]
        first = rows.setdefault(id(modules[row]), row)
        if owner_of(f"{first}.") is None and owner_of(f"{row}.") is not None:
            rows[id(modules[row])] = row
    places: list[Place] = []
    numbers: dict[str, int] = {}
    for name, block in found.items():
        row = block.rpartition(".")[0]
        if rows[id(modules[row])] == row:
            number = numbers.setdefault(block, len(numbers))
            places.append(Place(number, name, modules[name], owner_of(name) or model))
    return places


def embeds_patches(module: nn.Module) -> bool:
    """Whether a module is a model of timm's that makes tokens of an image."""
    return hasattr(module, "patch_embed") or hasattr(module, "embeds")


def select_blocks(blocks: str | int | slice | Sequence[int] | None, number: int) -> list[int]:
    """Numbers of the blocks that are asked for, ascending.

    Args:
        blocks: A slice as Python writes it (``"6:"``, ``"::2"``, ``":-1"``), numbers of blocks
            (``"0,3"``, 3, ``[0, 3]``), negative ones from the end; None for all.
        number: How many there are.

    Raises:
        ValueError: It is none of these, a number is out of range, or nothing is selected.
    """
    there_are = f"the model has blocks 0 to {number - 1}"
    if isinstance(blocks, str):
        blocks = _parsed(blocks)
    if blocks is None:
        return list(range(number))
    if isinstance(blocks, slice):
        if blocks.step == 0:
            raise ValueError("blocks: the step of a slice cannot be 0")
        chosen = list(range(number))[blocks]
        if not chosen:
            parts = (blocks.start, blocks.stop, blocks.step)
            text = ":".join("" if part is None else str(part) for part in parts).removesuffix(":")
            raise ValueError(f"blocks {text!r} selects nothing: {there_are}")
        return sorted(chosen)
    if isinstance(blocks, int):
        blocks = [blocks]
    if not isinstance(blocks, Iterable):
        raise ValueError(f"blocks must be whole numbers or a slice, got {blocks!r}")
    listed: list[int] = list(blocks)
    if not listed:
        raise ValueError(f"blocks selects nothing: {there_are}")
    for index in listed:
        if not isinstance(index, int) or isinstance(index, bool):
            raise ValueError(f"blocks must be whole numbers or a slice, got {index!r}")
        if not -number <= index < number:
            raise ValueError(f"there is no block {index}: {there_are}")
    return sorted({index % number for index in listed})


def _parsed(text: str) -> slice | list[int]:
    """The slice or numbers that a text means."""
    plain = text.replace(" ", "")
    match = _SLICE.fullmatch(plain)
    try:
        if match:
            return slice(*(int(part) if part else None for part in match.groups()))
        return [int(part) for part in plain.split(",")]
    except ValueError:
        raise ValueError(
            f"blocks must be a slice such as '6:' or numbers such as '0,3', got {text!r}"
        ) from None
