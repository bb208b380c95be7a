"""Comparing what the processes of a group must have alike, before they depend on each other.

Processes that share an image and disagree would exchange messages that do not fit, wait for each
other, or compute numbers of no image. So each brings a fingerprint of what has to be the same, in
one small exchange of fixed size. All of them see all fingerprints, and all raise the same error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from vitlinear.errors import UserError

SAMPLES = 4096  # values that a fingerprint looks at


# By a name for the user: the fact, whose text is compared, and what to do where it differs.
Facts = Mapping[str, tuple[object, str]]


def check_agreement(facts: Facts, group: distributed.ProcessGroup, device: torch.device) -> None:
    """Check that all processes of a group bring the same facts; all of them have to call it.

    Args:
        facts: Of this process.
        group: The processes.
        device: Where they exchange tensors.

    Raises:
        UserError: In all processes, with the first fact that differs, and its values.
    """
    if group.size() == 1:
        return
    numbers = torch.tensor([_digest(str(fact)) for fact, _ in facts.values()], device=device)
    every = [torch.empty_like(numbers) for _ in range(group.size())]
    distributed.all_gather(every, numbers, group=group)
    different = (torch.stack(every) != every[0]).any(0).tolist()
    if not any(different):
        return
    name = next(name for name, differs in zip(facts, different, strict=True) if differs)
    fact, advice = facts[name]
    texts: list[Any] = [None] * group.size()
    distributed.all_gather_object(texts, str(fact), group=group)
    values = ", ".join(f"{text} in process {rank}" for rank, text in enumerate(texts))
    raise UserError(f"the processes that share an image differ in {name}: {values}; {advice}")


def image_facts(images: Tensor) -> Facts:
    """Facts about images that every process has as a whole."""
    advice = "each has to get the same images, changed alike"
    return {
        "the shape of the images": (list(images.shape), advice),
        "the type of the images": (images.dtype, advice),
        "the images": (fingerprint(images), advice),
    }


def model_facts(model: str, stem: nn.Module, shard: Tensor, weights: bool) -> Facts:
    """Facts about a model and its forward pass.

    Args:
        model: `structure` of it.
        stem: Its first layers.
        shard: What they get: [B, C, rows, W].
        weights: Whether the weights of the stem are to be compared. They stand for those of the
            model: other seeds and other files give others.
    """
    kind = shard.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else "off"
    facts: dict[str, tuple[object, str]] = {
        "the model": (model, "build the same one in each, by the same arguments"),
        "the shape of the rows": (
            ["any" if axis == 2 else n for axis, n in enumerate(shard.shape)],
            "cut the same images",
        ),
        "the type of the rows": (shard.dtype, "cast them in each alike"),
        "the mode of the model": (
            "train" if stem.training else "eval",
            "call model.train() or model.eval() in each",
        ),
        "autocast": (autocast, "use it in all of them or in none"),
        "recording of gradients": (
            "on" if torch.is_grad_enabled() else "off",
            "use torch.no_grad() in all of them or in none",
        ),
    }
    if weights:
        facts["the weights of the model"] = (
            fingerprint(*stem.parameters()),
            "load the same file in each, or begin with the same torch.manual_seed",
        )
    return facts


def fingerprint(*tensors: Tensor) -> str:
    """A text that tells tensors from most others by some of their values.

    Empty where these are not there, or each process has a part of them.
    """
    if not tensors or any(x.is_meta or isinstance(x, DTensor) for x in tensors):
        return ""
    count = SAMPLES // len(tensors) + 1
    flat = (x.detach().flatten() for x in tensors)
    values = torch.cat([x[:: max(len(x) // count, 1)].double() for x in flat])
    return f"{_digest(values.cpu().numpy().tobytes().hex()):x}"


def structure(model: nn.Module) -> str:
    """A text that tells a model from others: its layers, and names, shapes and types of weights."""
    parts = [f"{name} {type(module).__qualname__}" for name, module in model.named_modules()]
    parts += [
        f"{name} {list(value.shape)} {value.dtype}"
        for name, value in (*model.named_parameters(), *model.named_buffers())
    ]
    return f"{type(model).__name__} {_digest(' '.join(parts)):x}"


def _digest(text: str) -> int:
    """63 bits that depend on every character."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
