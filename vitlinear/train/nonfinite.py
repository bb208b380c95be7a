"""Diagnosis of a training step whose loss or gradients are not finite."""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import nn


class Diagnosis(NamedTuple):
    """Where a batch stops being finite.

    Attributes:
        found: Whether there is such a place before the loss.
        text: The place, with statistics, and advice.
        order: Number of the layer among those that ran before it.
    """

    found: bool
    text: str
    order: int = 0


def what_may_help(clips: bool, float16: bool) -> str:
    """Returns advice for the user.

    Args:
        clips: Whether gradients are clipped already.
        float16: Whether float16 is in use.
    """
    more = ("" if clips else ", add --clip-grad 1") + (
        ", use --amp-dtype bfloat16 in place of float16" if float16 else ""
    )
    return f"Lower --lr{more}; --resume goes on from the last state, if one was saved already"


def describe(tensor: torch.Tensor) -> str:
    """Returns shape, type, counts of NaN and infinity, and the range of what is finite."""
    values = tensor.detach()
    finite = values[values.isfinite()].float()
    text = f"{list(values.shape)} {str(values.dtype).removeprefix('torch.')}"
    text += f", {int(values.isnan().sum())} NaN, {int(values.isinf().sum())} infinite"
    if finite.numel():
        text += f", finite ones from {finite.min().item():.4g} to {finite.max().item():.4g}"
    return text


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return []


def _bad(value: Any) -> torch.Tensor | None:
    return next((x for x in _tensors(value) if not bool(x.isfinite().all())), None)


@torch.no_grad()
def diagnose(
    model: nn.Module,
    images: torch.Tensor,
    autocast: Any,
    advice: str,
    share: Any = contextlib.nullcontext,
) -> Diagnosis:
    """Runs a batch again and says where it stops being finite.

    The model is to be in the state, and the random generators at the seed, of the step that went
    wrong. BatchNorm statistics are left as they are.

    Args:
        model: Without wrappers of compilation or distribution, in the mode it failed in.
        images: ``[B, C, H, W]``.
        autocast: Function returning the context of a forward pass.
        advice: What to do about it, if it is not the images.
        share: Returns the context that gives this process's part of the images.

    Returns:
        The first of images, weights, and layers in order of execution that holds a NaN or an
        infinity, with the statistics of what went in and what came out; and the advice.
    """
    if _bad(images) is not None:
        return Diagnosis(
            True,
            f"the images themselves are not finite: {describe(images)}; check the data and --std",
        )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not bool(value.isfinite().all()):
            return Diagnosis(
                True,
                f"the weights are not finite before this step already; first {name}: "
                f"{describe(value)}. {advice}",
            )
    found: list[str] = []
    finite = 0

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal finite
            bad = None if found else _bad(output)
            finite += not found and bad is None
            if bad is not None:
                given = "; ".join(describe(x) for x in _tensors(inputs)) or "no tensor"
                kind = type(module).__name__
                found.append(
                    f"first layer with non-finite activations: {name or 'the model'} ({kind})\n"
                    f"  in: {given}\n  out: {describe(bad)}"
                )

        return hook

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # A layer's hook runs before those of the modules around it: the first hit is the innermost.
    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with share(images) as part, autocast():
            output = model(part)
    finally:
        for hook in hooks:
            hook.remove()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    if found:
        return Diagnosis(True, f"{found[0]}. {advice}", finite)
    top = max(float(x.abs().max()) for x in _tensors(output))
    return Diagnosis(
        False,
        f"every activation of the forward pass is finite (the largest logit is {top:.4g}): "
        f"the loss or its gradients overflow. {advice}",
    )
