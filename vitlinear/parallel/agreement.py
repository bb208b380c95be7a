"""What all processes of a group have to have alike, compared before they depend on each other.

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

from vitlinear.errors import UserError

SAMPLES = 4096  # values of a tensor that its fingerprint looks at


def check_agreement(
    facts: Mapping[str, tuple[object, str]],
    group: distributed.ProcessGroup,
    device: torch.device,
) -> None:
    """Checks that all processes of a group bring the same facts; all of them have to call it.

    Args:
        facts: By a name for the user, the fact, whose text is compared, and what to do where it
            differs.
        group: The processes.
        device: Where they exchange tensors.

    Raises:
        UserError: In all processes, with the first fact that differs, and its values if short.
    """
    numbers = torch.tensor([_digest(str(fact)) for fact, _ in facts.values()], device=device)
    every = [torch.empty_like(numbers) for _ in range(group.size())]
    distributed.all_gather(every, numbers, group=group)
    different = (torch.stack(every) != every[0]).any(0).tolist()
    if not any(different):
        return
    name = next(name for name, differs in zip(facts, different, strict=True) if differs)
    fact, advice = facts[name]
    texts: list[str] = [""] * group.size()
    distributed.all_gather_object(texts, str(fact), group=group)
    shown = ""
    if max(map(len, texts)) <= 60:
        shown = ": " + ", ".join(f"{text} on rank {rank}" for rank, text in enumerate(texts))
    raise UserError(f"the processes that share an image differ in {name}{shown}; {advice}")


def _digest(text: str) -> int:
    """63 bits that depend on every character."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def fingerprint(x: Tensor) -> str:
    """A text that tells a tensor from most others: type, shape, and some of its values."""
    values = x.detach().flatten()
    values = values[:: max(len(values) // SAMPLES, 1)].contiguous()
    content = values.view(torch.uint8).cpu().numpy().tobytes()
    return f"{x.dtype} {list(x.shape)} {_digest(content.hex()):x}"


def structure(model: nn.Module) -> str:
    """A text that tells a model from others: its layers, and names, shapes and types of weights."""
    parts = [f"{name} {type(module).__qualname__}" for name, module in model.named_modules()]
    parts += [
        f"{name} {list(value.shape)} {value.dtype}"
        for name, value in (*model.named_parameters(), *model.named_buffers())
    ]
    return f"{_digest(' '.join(parts)):x}"


def weights(model: nn.Module) -> str:
    """A text that tells the weights of a model from others, some values of each of them.

    Empty where they are not there yet, or each process has a part.
    """
    values: list[Any] = [*model.parameters(), *model.buffers()]
    if any(value.is_meta or type(value.data) is not Tensor for value in values):
        return ""
    return f"{_digest(' '.join(map(fingerprint, values))):x}"


def random_state(device: torch.device) -> str:
    """A text that tells what the generators of the CPU and of a GPU draw next."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return " ".join(f"{_digest(state.numpy().tobytes().hex()):x}" for state in states)
