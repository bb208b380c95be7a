"""Other attentions in the place of timm's, in a model that is there."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from vitlinear._timm import NaFlexVit, SamAttention, SwinAttention, update_model_args
from vitlinear.errors import did_you_mean
from vitlinear.mixers import describe_attention, make_mixer
from vitlinear.mixers.attention import check_rope

from .attentions import (
    REPLACED,
    ReplacedAttention,
    ReplacedMapAttention,
    ReplacedWindowAttention,
)
from .blocks import Place, embeds_patches, find_attentions, select_blocks
from .kinds import PARTS, parts_of, why_not
from .report import Replacement, ReplacementReport
from .token_map import TokenMap, token_map

# The model of the registry that a replaced one is saved as; see `rebuild.py`.
ARCHITECTURE = "replaced_attention"


def replace_attention(
    model: nn.Module,
    name: str,
    blocks: str | int | slice | Sequence[int] | None = None,
    keep: Iterable[str] | None = None,
    *,
    rope: bool = False,
    **options: Any,
) -> ReplacementReport:
    """Replace attentions of a timm model by another of the registry, in place.

    Projections keep their modules, weights and names; so do the parts that are kept. What the new
    attention learns stands under ``mixer``, with its initial values. Nothing is changed if an error
    is raised.

    A model from ``timm.create_model`` afterwards is ``replaced_attention`` of timm's registry, so
    that ``save_for_hf`` and ``push_to_hf_hub`` write what builds it again where ``vitlinear`` is
    imported. What blocks have in common, such as learned rotary positions, gets
    ``requires_grad=False`` where no attention uses it any more.

    Args:
        model: Any that has attentions of the kinds of `kinds.KINDS`, also inside of other modules.
            Give it the whole model: its blocks alone tell neither what they have in common, nor how
            the model is built again.
        name: One of `vitlinear.list_attentions()`.
        blocks: Which blocks, in timm's order: a slice (``"6:"``, ``"::2"``), or numbers
            (``"0,3"``, 3, ``[0, 3]``), negative ones from the end; None for all.
        keep: Parts of timm's attention that stay, of `kinds.PARTS`. An attention with a part that
            is to stay and cannot is refused; a part that is not named is left out. None names all.
        rope: Whether the new attention has 2-D rotary positions of its own, beside those of the
            model.
        **options: Those of the new attention; ``vitlinear attentions NAME`` lists them.

    Returns:
        What became of each attention of these blocks. Those that were refused are as they were.

    Raises:
        ValueError: A name or option is unknown, the model has no attention or is one, nothing is
            selected, or all that is selected was refused; one line.
    """
    return replace_with(model, name, blocks, keep, rope, options)


def replace_with(
    model: nn.Module,
    name: str,
    blocks: Any,
    keep: Iterable[str] | None,
    rope: bool,
    options: Mapping[str, Any],
) -> ReplacementReport:
    """As `replace_attention`, with the options of the new attention as a mapping."""
    describe_attention(name).check_options(options)
    kept = _kept_parts(keep)
    if not isinstance(rope, bool):
        raise ValueError(f"rope must be True or False, got {rope!r}")
    places = find_attentions(model)
    kind = type(model).__name__
    if not places:
        raise ValueError(f"{kind} has no attention of timm's that could be replaced")
    if places[0].name == "":
        raise ValueError(
            f"{kind} is an attention itself, and is replaced in the model that holds it: give "
            "replace_attention that model"
        )
    number = 1 + max(place.block for place in places)
    chosen = set(select_blocks(blocks, number))
    _check_shared(places, chosen)
    rows: list[Replacement] = []
    made: list[tuple[Place, ReplacedAttention]] = []
    common: dict[int, tuple[ReplacedAttention, tuple[str, ...]]] = {}  # by the one that was there
    for place in places:
        if place.block not in chosen:
            continue
        was = getattr(place.module, "was", type(place.module).__name__)
        try:
            if id(place.module) not in common:
                common[id(place.module)] = _replacement(place, name, kept, rope, options)
        except _Refused as refusal:
            rows.append(Replacement(place.block, place.name, was, None, (), str(refusal)))
            continue
        new, dropped = common[id(place.module)]
        made.append((place, new))
        rows.append(Replacement(place.block, place.name, was, name, dropped, ""))
    if not made:
        raise ValueError(f"nothing of {kind} can be replaced by {name}: {rows[0].reason}")
    for place, new in made:
        parent, _, attribute = place.name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
        if new.token_map is not None:
            new.token_map.watch()
        if isinstance(place.owner, NaFlexVit):
            place.owner.use_key_only_attn_mask = True  # instead of one for each query
        _freeze_unused(place.owner)
    _record(
        model,
        {id(new) for _, new in made},
        {"attention": name, "keep": sorted(kept), "rope": rope, "options": dict(options)},
    )
    return ReplacementReport(rows)


class _Refused(Exception):
    """An attention stays as it is; the message says why."""


def _kept_parts(keep: Iterable[str] | None) -> set[str]:
    """The parts that are to stay.

    Raises:
        ValueError: There is no such part.
    """
    if keep is None:
        return set(PARTS)
    parts = [keep] if isinstance(keep, str) or not isinstance(keep, Iterable) else list(keep)
    for part in parts:
        if isinstance(part, str) and part in PARTS:
            continue
        raise ValueError(
            f"keep: there is no part {part!r}{did_you_mean(str(part), PARTS)}; it may name "
            f"{', '.join(PARTS)}"
        )
    return set(parts)


def _check_shared(places: Sequence[Place], chosen: set[int]) -> None:
    """Check that blocks which have one attention in common are all chosen, or none of them.

    Raises:
        ValueError: Some are and some are not.
    """
    shared: dict[int, list[Place]] = {}
    for place in places:
        shared.setdefault(id(place.module), []).append(place)
    for of_one in shared.values():
        numbers = {place.block for place in of_one}
        if numbers & chosen and numbers - chosen:
            listed = ", ".join(map(str, sorted(numbers)))
            raise ValueError(
                f"blocks {listed} have one attention in common: choose all of them, or none"
            )


def _replacement(
    place: Place, name: str, keep: set[str], rope: bool, options: Mapping[str, Any]
) -> tuple[ReplacedAttention, tuple[str, ...]]:
    """An attention in the place of another, and the parts that it is without.

    Raises:
        _Refused: The attention has to stay.
        ValueError: The mixer cannot be made for any attention of this size.
    """
    old: Any = place.module
    again = isinstance(old, ReplacedAttention)
    reason = None if again else why_not(old)
    if reason:
        raise _Refused(reason)
    _check_plain(old)
    parts = set(old.parts) if again else parts_of(old, place.owner)
    if "bias" in parts & keep:
        raise _Refused(
            f"adds a table of biases to its logits, which {name} has none of: leave 'bias' out of "
            "keep to do without"
        )
    dropped = [part for part in PARTS if part in parts - keep]
    if not again and getattr(old.attn_drop, "p", 0) > 0:  # which may have been exchanged
        dropped.append("attn_drop")
    weight = old.proj.weight
    dim = weight.shape[1]
    inside = old.qkv.in_features if old.qkv is not None else old.q_proj.in_features
    description = describe_attention(name)
    if description.needs_input and inside != dim:
        raise _Refused(
            f"{name} reads the input of the layer, whose {inside} channels are not the {dim} of "
            "its heads"
        )
    spec = {"name": name, **options}
    mixer = make_mixer(spec, dim, old.num_heads, device=weight.device, dtype=weight.dtype)
    if mixer.moves_in_training and "mask" in parts & keep:
        raise _Refused(
            f"mixes regions of shifted windows apart, from which {name} cannot learn its "
            f"{' and '.join(mixer.moves_in_training)}: leave 'mask' out of keep"
        )
    if rope:
        check_rope(mixer)
    knows_map = (SwinAttention, SamAttention, ReplacedWindowAttention, ReplacedMapAttention)
    where: TokenMap | None = None
    if (rope or mixer.order != "free") and not isinstance(old, knows_map):
        try:
            where = token_map(place.owner)
        except ValueError as error:
            raise _Refused(f"{name}{' with rope' if rope else ''} {error}") from None
    cls = type(old) if again else REPLACED[type(old)]
    prefix = int(getattr(place.owner, "num_prefix_tokens", 0))
    new = cls(old, mixer, parts & keep, rope=rope, token_map=where, num_prefix_tokens=prefix)
    return new, tuple(dropped)


def _check_plain(old: Any) -> None:
    """Check that nothing was done to an attention that would be lost with it.

    Raises:
        _Refused: Something was.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(old, kind) for kind in kinds):
        raise _Refused(
            "has hooks, which would be lost: remove them, and register them on the new attention"
        )
    if "forward" in vars(old):
        raise _Refused("has a forward of its own, which would be lost: remove it")
    for name in ("qkv", "q_proj", "proj"):  # which sizes and types are read from
        module = getattr(old, name, None)
        known = hasattr(module, "weight") and hasattr(module, "in_features")
        if module is not None and not known:
            raise _Refused(
                f"has a {type(module).__name__} as {name}, which tells no weight and in_features"
            )


# What blocks of a model have in common, by the part that they are without it.
_COMMON = {"rope": ("rope",), "bias": ("rel_pos_bias", "shared_rel_pos")}


def _freeze_unused(owner: Any) -> None:
    """Have no gradient asked of what no block uses any more.

    Data-parallel training waits for gradients of all that asks for one.
    """
    attentions = [getattr(block, "attn", None) for block in getattr(owner, "blocks", ())]
    replaced = [isinstance(attention, ReplacedAttention) for attention in attentions]
    if not replaced or not all(replaced):
        return
    for part, names in _COMMON.items():
        if any(part in attention.parts for attention in attentions):  # type: ignore[union-attr]
            continue
        for name in names:
            module = getattr(owner, name, None)
            if isinstance(module, nn.Module):
                module.requires_grad_(False)


def _record(model: nn.Module, made: set[int], done: Mapping[str, Any]) -> None:
    """Note in each model of timm's factory, inside or outside, how it is built again.

    timm saves the architecture of ``pretrained_cfg`` and the arguments of the factory.

    Args:
        model: That was given; what it holds is looked through.
        made: Identities of the new attentions.
        done: An entry of ``replacements`` of `rebuild.replaced_attention`, but for ``blocks``,
            whose numbers are those of each model.
    """
    module: Any
    found = False
    for module in list(model.modules()):
        cfg = getattr(module, "pretrained_cfg", None)
        if not isinstance(cfg, dict) or not cfg.get("architecture"):
            continue
        places = find_attentions(module)
        blocks = sorted({place.block for place in places if id(place.module) in made})
        if not blocks:
            continue
        found = True
        arguments = getattr(module, "_model_args", {})
        if cfg["architecture"] != ARCHITECTURE:
            update_model_args(module, base=cfg["architecture"])
            module.pretrained_cfg = module.default_cfg = {**cfg, "architecture": ARCHITECTURE}
        ordered = {"attention": done["attention"], "blocks": blocks, **done}
        update_model_args(module, replacements=[*arguments.get("replacements", ()), ordered])
    part_of_timms = type(model).__module__.partition(".")[0] in ("timm", "torch")
    if not found and part_of_timms and not any(embeds_patches(m) for m in model.modules()):
        warnings.warn(
            f"{type(model).__name__} is part of a model, which is not told of the new attentions: "
            "saved by timm, it would be built without them; give replace_attention the whole model",
            stacklevel=4,
        )
