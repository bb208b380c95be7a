"""A report on which attention implementation a model would run."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitlinear.ops import Choice, Workload, choose_backend
from vitlinear.ops.backend import observed


class AttentionCall(NamedTuple):
    """One attention of a model and what would run for it.

    Attributes:
        name: Path of the module.
        attn_type: Linear mechanism or ``softmax``.
        shape: Of the queries, [B, N, h, D].
        backend: Implementation that would run.
        reason: Why that one.
    """

    name: str
    attn_type: str
    shape: tuple[int, int, int, int]
    backend: str
    reason: str


class BackendReport(tuple[AttentionCall, ...]):
    """The attention calls of a model in order; prints as a table."""

    def __str__(self) -> str:
        header = ("module", "attention", "B x N x h x D", "backend", "reason")
        rows = [
            (row.name, row.attn_type, " x ".join(map(str, row.shape)), row.backend, row.reason)
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        )


def _shape_of_queries(module: Any, x: Tensor) -> tuple[int, int, int, int]:
    """[B, N, h, D] of an attention by its first input: tokens [B, N, C], a map [B, H, W, C], or
    queries [B, N, h, D]."""
    batch, *shape = x.shape
    heads = tuple(shape[-2:]) == (module.num_heads, module.head_dim)
    return batch, prod(shape[: -2 if heads else -1]), module.num_heads, module.head_dim


class Attention(NamedTuple):
    """One call of an attention, as a model makes it.

    Attributes:
        name: Path of the module.
        requested: The backend that the module was made with.
        shape: Of the queries, [B, N, h, D].
        work: The call, on the model's device and in its mode; None where softmax runs on SDPA.
    """

    name: str
    requested: str
    shape: tuple[int, int, int, int]
    work: Workload | None


def attention_calls(model: nn.Module, input_size: Sequence[int] | None = None) -> list[Attention]:
    """List the attentions of a model in the order of their calls; see `backend_report`.

    Nothing is computed: the model is traced on the meta device. What `torch.compile` made of it or
    of its parts runs uncompiled, and has the names that it had before.
    """
    model = getattr(model, "_orig_mod", model)
    attentions: dict[str, Any] = {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if hasattr(module, "attn_type") and hasattr(module, "backend")
    }
    if not attentions:
        raise ValueError(f"{type(model).__name__} has no attention of vitlinear to report on")
    if input_size is None:
        height_width = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:]
        input_size = (1, getattr(model, "in_chans", 3), *height_width)
    calls: list[Attention] = []
    running = ""

    def enter(name: str) -> Any:
        def record(module: Any, args: tuple[Any, ...]) -> None:
            nonlocal running
            running = name
            if module.attn_type == "softmax":
                shape = _shape_of_queries(module, args[0])
                calls.append(Attention(name, module.backend, shape, None))

        return record

    def observe(work: Workload) -> None:
        shape = (work.batch, work.length, work.heads, work.head_dim)
        here = work.on(device, training)
        calls.append(Attention(running, attentions[running].backend, shape, here))

    handles = [m.register_forward_pre_hook(enter(name)) for name, m in attentions.items()]
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parameter = next(model.parameters())
    dtype, device, training = parameter.dtype, parameter.device, model.training
    modes = {module: module.training for module in model.modules()}
    model.eval()  # batch norm refuses to train on a single value
    try:
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), observed(observe):
            torch.func.functional_call(
                model,
                {name: value.detach().to("meta") for name, value in state.items()},
                (torch.empty(tuple(input_size), device="meta", dtype=dtype),),
            )
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return calls


def backend_report(model: nn.Module, input_size: Sequence[int] | None = None) -> BackendReport:
    """Tell which implementation every attention of a model would run, and why.

    Nothing is computed: the model is traced on the meta device. What depends on whether a backward
    pass follows is told for the mode that the model is in, training or evaluation.

    Args:
        model: A model of this package, on any device, compiled or not.
        input_size: Shape of the images, [B, C, H, W]; one of the model's own size by default.

    Returns:
        One `AttentionCall` for each attention in the order of their calls; `print` shows a table.

    Raises:
        ValueError: The model has no attention of this package.
    """
    rows: list[AttentionCall] = []
    for name, requested, shape, work in attention_calls(model, input_size):
        if work is None:
            rows.append(AttentionCall(name, "softmax", shape, "eager", "softmax runs on SDPA"))
            continue
        try:
            choice = choose_backend(requested, work, may_check=False)
        except ValueError as error:
            choice = Choice("none", str(error))
        rows.append(AttentionCall(name, work.mechanism, shape, *choice))
    return BackendReport(rows)
