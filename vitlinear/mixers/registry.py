"""The registry of attentions: descriptions and mixers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vitlinear.errors import did_you_mean

from .description import AttentionDescription
from .mixer import Mixer

M = TypeVar("M", bound=type[Mixer])

# An attention in the arguments of a model: its name, or its name and options, as JSON can have it.
AttentionSpec = str | Mapping[str, Any]

_mixers: dict[str, type[Mixer]] = {}


def register(description: AttentionDescription) -> Callable[[M], M]:
    """Class decorator that puts a mixer into the registry.

    Args:
        description: Of the attention; its name is the mixer's.

    Raises:
        ValueError: The name is taken.
    """

    def add(mixer: M) -> M:
        if description.name in _mixers:
            raise ValueError(f"there is an attention {description.name!r} already")
        mixer.description = description
        _mixers[description.name] = mixer
        return mixer

    return add


def find_mixer(name: str) -> type[Mixer]:
    """The class of a mixer.

    Raises:
        ValueError: There is none of this name; one line, with the nearest match.
    """
    mixer = _mixers.get(name) if isinstance(name, str) else None
    if mixer is None:
        near = did_you_mean(str(name), _mixers)
        raise ValueError(
            f"unknown attention {name!r}{near}; `vitlinear attentions` lists all of them"
        )
    return mixer


def describe_attention(name: str, **options: Any) -> AttentionDescription:
    """The description of an attention.

    Args:
        name: One of `list_attentions`.
        **options: Those of the attention, which may change its order or its cost; the others have
            their defaults.

    Raises:
        ValueError: There is none of this name, or an option is unknown or out of range; one line,
            with the nearest match.
    """
    return find_mixer(name).description.with_options(options)


def list_attentions(
    filter: str | Callable[[AttentionDescription], bool] | None = None,
) -> list[str]:
    """Names of attentions, sorted.

    Args:
        filter: A pattern of shell style for names, such as ``"*former"``; or a function of the
            description, such as ``lambda d: d.order == "free" and d.positive``; None for all.

    Returns:
        The names; `describe_attention` has what is known of each.
    """
    from fnmatch import fnmatch

    chosen = []
    for name, mixer in _mixers.items():
        if filter is None:
            chosen.append(name)
        elif isinstance(filter, str):
            if fnmatch(name, filter):
                chosen.append(name)
        elif filter(mixer.description):
            chosen.append(name)
    return sorted(chosen)


def split_spec(spec: AttentionSpec) -> tuple[str, dict[str, Any]]:
    """Name and options of an attention in the arguments of a model.

    Args:
        spec: A name, or a mapping with the key ``name`` and options beside it.

    Raises:
        ValueError: It is neither; one line.
    """
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ValueError(
            f"an attention is a name, or a mapping with 'name' and options, got {spec!r}"
        )
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}


def make_mixer(spec: AttentionSpec, dim: int, num_heads: int, **kwargs: Any) -> Mixer:
    """A mixer by name and options.

    Args:
        spec: As `split_spec`.
        dim: Channels of all heads, C.
        num_heads: Heads, h.
        **kwargs: ``backend``, ``device`` and ``dtype``, as `Mixer`.

    Raises:
        ValueError: A name or option is unknown or out of range, or the sizes do not fit; one line.
    """
    name, options = split_spec(spec)
    kind = find_mixer(name)
    mixer = kind(dim, num_heads, **kind.description.check_options(options), **kwargs)
    mixer.order = kind.description.with_options(options).order
    return mixer
