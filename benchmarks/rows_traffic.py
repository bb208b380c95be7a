"""Counts what a process sends to those that share an image with it, by the layer that sends it."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("state", "halo", "map")


class Message(NamedTuple):
    """One exchange.

    Attributes:
        way: ``forward`` or ``backward``.
        layer: Class of the innermost module that runs; of backward passes, none.
        operator: What is called.
        sent: Bytes from this process to others; of a sum, those of the summed tensor.
    """

    way: str
    layer: str
    operator: str
    sent: int


class Traffic(TorchDispatchMode):
    """Notes every exchange of `vitlinear.parallel` inside of it.

    Args:
        model: Whose layers are told apart.

    Attributes:
        messages: In order.
        backward: Whether the pass is the backward one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.messages: list[Message] = []
        self.backward = False
        self.running: list[str] = []

    def __enter__(self) -> Traffic:
        def enter(module: nn.Module, _: Any) -> None:
            self.running.append(type(module).__name__)

        def leave(module: nn.Module, *_: Any) -> None:
            self.running.pop()

        self.hooks = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operators = torch.ops.vitlinear
        if func is operators.total_rows.default:
            self._add("sum", args[0].numel() * args[0].itemsize)
        elif func is operators.exchange_rows.default:
            x, sent = args[0], args[1]
            own = torch.distributed.get_rank()
            others = sum(n for rank, n in enumerate(sent) if rank != own)
            self._add("exchange", others * x.itemsize)
        return func(*args, **(kwargs or {}))

    def _add(self, operator: str, sent: int) -> None:
        layer = self.running[-1] if self.running else ""
        way = "backward" if self.backward else "forward"
        self.messages.append(Message(way, layer, operator, sent))


def growth(small: list[Message], tall: list[Message], wide: list[Message]) -> dict[str, Any]:
    """Tells by three images what the bytes of each exchange depend on.

    Args:
        small: Exchanges of an image of 384 x 128.
        tall: Of one of 768 x 128.
        wide: Of one of 384 x 256.

    Returns:
        ``passes``: for forward and backward and each kind the ``calls`` and ``bytes``: of a
        ``state`` all of them, of a ``halo`` those for a column of the image, of a ``map`` those
        for a pixel. ``layers``: the same of each layer's forward exchanges.

    Raises:
        ValueError: The exchanges are not the same, or the bytes grow in another way.
    """
    if not len(small) == len(tall) == len(wide):
        raise ValueError(f"{len(small)}, {len(tall)} and {len(wide)} exchanges")
    passes: dict[str, Any] = {
        way: {kind: {"calls": 0, "bytes": 0} for kind in KINDS} for way in ("forward", "backward")
    }
    layers: dict[str, Any] = defaultdict(lambda: {kind: {"calls": 0, "bytes": 0} for kind in KINDS})
    unlike: Counter[tuple[Any, ...]] = Counter()
    for a, b, c in zip(small, tall, wide, strict=True):
        if a.sent == b.sent == c.sent:
            kind, scale = "state", 1
        elif b.sent == a.sent and c.sent == 2 * a.sent:
            kind, scale = "halo", 128
        elif abs(b.sent - 2 * a.sent) <= 0.1 * b.sent and c.sent == 2 * a.sent:
            kind, scale = "map", 384 * 128
        else:
            unlike[(a, b.sent, c.sent)] += 1
            continue
        for row in (
            (passes[a.way][kind], layers[a.layer][kind])
            if a.way == "forward"
            else (passes[a.way][kind],)
        ):
            row["calls"] += 1
            row["bytes"] += a.sent / scale if scale > 1 else a.sent
    return {"passes": passes, "layers": dict(layers), "unlike": [str(x) for x in unlike]}


def by_layer(name: str, found: dict[str, Any]) -> list[str]:
    """A Markdown table of the forward exchanges of a model, by layer."""
    lines = [
        "",
        f"`{name}`, forward, by layer",
        "",
        "| layer | calls | bytes |",
        "| --- | --- | --- |",
    ]
    units = {"state": "B", "halo": "B per column", "map": "B per pixel"}
    for layer, kinds in found["layers"].items():
        for kind in KINDS:
            if kinds[kind]["calls"]:
                lines.append(
                    f"| {layer} | {kinds[kind]['calls']} | {kinds[kind]['bytes']:.6g} {units[kind]} |"
                )
    return lines + [f"unlike: {text}" for text in found["unlike"]]
