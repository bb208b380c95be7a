"""Counts what a process sends to those that share an image with it, by the layer that sends it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

RANKS = 3  # that exchange while it is counted
# Images: a first one, one of twice its columns, and one of more rows.
SIZES = ((384, 64), (384, 128), (768, 64))
UNITS = {
    "sum": "B",
    "state": "B to each process",
    "halo": "B for a column",
    "map": "B for a pixel, to each process",
}


class Message(NamedTuple):
    """One exchange.

    Attributes:
        way: ``forward`` or ``backward``.
        layer: Class of the innermost module that runs; of backward passes, none.
        summed: Whether it is a sum; else tensors are sent as they are.
        sent: Bytes from this process to others; of a sum, those of the summed tensor.
    """

    way: str
    layer: str
    summed: bool
    sent: int


class Traffic(TorchDispatchMode):
    """Notes every exchange of `vitlinear.parallel` inside of it.

    Attributes:
        messages: In order.
        way: Of what is noted now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []
        self.way = "forward"
        self.running: list[str] = []

    def __enter__(self) -> Traffic:
        def enter(module: nn.Module, _: Any) -> None:
            self.running.append(type(module).__name__.removeprefix("Split"))

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
            self._add(True, args[0].numel() * args[0].itemsize)
        elif func is operators.exchange_rows.default:
            own = torch.distributed.get_rank()
            others = sum(n for rank, n in enumerate(args[1]) if rank != own)
            self._add(False, others * args[0].itemsize)
        return func(*args, **(kwargs or {}))

    def _add(self, summed: bool, sent: int) -> None:
        layer = self.running[-1] if self.running else ""
        self.messages.append(Message(self.way, layer, summed, sent))


def growth(*images: list[Message]) -> dict[str, Any]:
    """Tells what the bytes of each exchange depend on.

    Args:
        *images: The exchanges of the middle one of `RANKS` processes, for each of `SIZES`.

    Returns:
        ``passes``: for forward and backward and each kind of `UNITS`, ``calls`` and ``bytes``.
        ``layers``: the same of each layer's forward exchanges. Where the exchanges of the images
        are not the same ones, because windows end at cuts, those of the wide image count, all but
        sums as halos.
    """
    first, wide, tall = images
    alike = len(first) == len(wide) == len(tall)
    height, width = SIZES[0]

    def empty() -> dict[str, dict[str, float]]:
        return {kind: {"calls": 0, "bytes": 0} for kind in UNITS}

    passes = {way: empty() for way in ("forward", "backward")}
    layers: dict[str, Any] = defaultdict(empty)
    for same in zip(*(images if alike else (wide,)), strict=True):
        one, sent = same[0], [message.sent for message in same]
        if one.summed:
            kind, size = "sum", float(sent[0])
        elif not alike:
            kind, size = "halo", sent[0] / SIZES[1][1]
        elif len(set(sent)) == 1:
            kind, size = "state", sent[0] / (RANKS - 1)
        elif all(
            n * height * width == sent[0] * h * w for n, (h, w) in zip(sent, SIZES, strict=True)
        ):
            kind, size = "map", sent[0] / (RANKS - 1) / (height // RANKS * width)
        else:
            kind, size = "halo", max(n / w for n, (_, w) in zip(sent, SIZES, strict=True))
        rows = [passes[one.way][kind]]
        if one.way == "forward":
            rows.append(layers[one.layer][kind])
        for row in rows:
            row["calls"] += 1
            row["bytes"] += size
    return {"passes": passes, "layers": dict(layers)}


def table(found: dict[str, Any], of_each: str) -> list[str]:
    """A Markdown table of models: calls and bytes of their exchanges.

    Args:
        found: By model, of `growth`.
        of_each: ``pass``, or ``layer`` for those of the forward pass.
    """
    units = (f"{kind}: calls, {unit}" for kind, unit in UNITS.items())
    lines = [f"| model | {of_each} | {' | '.join(units)} |"]
    lines.append("| --- " * (len(UNITS) + 2) + "|")
    for name, counts in found.items():
        for one, kinds in counts["passes" if of_each == "pass" else "layers"].items():
            cells = (_cell(kinds[kind]) for kind in UNITS)
            label = one if of_each == "pass" else f"`{one}`"
            lines.append(f"| `{name}` | {label} | {' | '.join(cells)} |")
    return lines


def _cell(row: dict[str, float]) -> str:
    return f"{row['calls']}, {row['bytes']:.6g}" if row["calls"] else ""
