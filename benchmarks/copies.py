"""Counts the copies of a pass: tensors laid out anew, by a profile of PyTorch.

    python benchmarks/copies.py ravlt_t l2vit_tiny swin_tiny_patch4_window7_224
    python benchmarks/copies.py ravlt_t --train --backend library
    python benchmarks/copies.py ravlt_t --turns 20   # time of a step, against stacked gradients

Counts and MiB are the same on every run and machine with one version of PyTorch; the share of time
is not. Reorderings inside oneDNN's convolutions and products are theirs, and not seen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from math import prod
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vitlinear.ops import packed

# Each makes a tensor of what stands in others. clone, contiguous and pad show as copy_.
COPIES = ("aten::copy_", "aten::cat", "aten::roll", "aten::stack")


def copies_of(
    model: nn.Module, images: torch.Tensor
) -> tuple[int, int, float, tuple[float, float]]:
    """Count the copies of one forward pass; in training mode, of the backward pass too.

    Returns:
        Copies made by copy_, by the others, MiB that copy_ wrote (of numbers of 4 bytes), and the
        share of copy_ and that of the others in the time of the operators, from 0 to 1.
    """

    def run_once() -> None:
        if model.training:
            model.zero_grad()
            model(images).sum().backward()
        else:
            with torch.no_grad():
                model(images)

    run_once()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
        run_once()
    events = run.events()
    copied = [event for event in events if event.name == COPIES[0]]
    others = [event for event in events if event.name in COPIES[1:]]
    size = sum(prod(event.input_shapes[0]) for event in copied)
    time = sum(event.self_cpu_time_total for event in events)
    first, second = (sum(e.self_cpu_time_total for e in part) / time for part in (copied, others))
    return len(copied), len(others), size * 4 / 2**20, (first, second)


def unbind(projection: Tensor) -> tuple[Tensor, ...]:
    """Returns the parts that `packed.unpack` does; autograd stacks their gradients."""
    parts = projection.unbind(2)
    return (*parts, *parts[2:3])


def times_of_steps(model: nn.Module, images: Tensor, turns: int) -> tuple[float, float, float]:
    """Time training steps in turns with the same steps where projections are unbound.

    Returns:
        Median seconds of both, and the median of the ratios of single turns.
    """

    def step() -> float:
        model.zero_grad()
        began = time.perf_counter()
        model(images).sum().backward()
        return time.perf_counter() - began

    def other() -> float:
        with mock.patch.object(packed, "unpack", unbind):
            return step()

    step(), other()
    pairs = []
    for turn in range(turns):
        first, second = (step, other) if turn % 2 else (other, step)
        one, two = first(), second()
        pairs.append((one, two) if turn % 2 else (two, one))
    ours, theirs = zip(*pairs, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return statistics.median(ours), statistics.median(theirs), ratio


def main() -> None:
    """Print a table with a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), help="height and width")
    parser.add_argument("--batch-size", "-b", type=int, default=1)
    parser.add_argument("--train", action="store_true", help="a training step instead")
    parser.add_argument("--backend", help="attn_backend of the models; default: their own")
    parser.add_argument(
        "--turns", type=int, help="time so many training steps, and likewise unbound, instead"
    )
    args = parser.parse_args()
    options = {"attn_backend": args.backend} if args.backend else {}
    torch.set_num_threads(1)
    images = torch.randn(args.batch_size, 3, *args.size)
    if args.turns:
        for name in args.models:
            model = timm.create_model(name, **options).train()
            ours, theirs, ratio = times_of_steps(model, images, args.turns)
            print(f"{name}: {ours:.3f} s, {theirs:.3f} s unbound, ratio {ratio:.3f}", flush=True)
        return
    print("| model | copies | cat, roll, stack | MiB copied | time of copies | of the others |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        model = timm.create_model(name, **options).train(args.train)
        count, others, size, (first, second) = copies_of(model, images)
        print(
            f"| `{name}` | {count} | {others} | {size:.1f} | {first:.1%} | {second:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
