"""Counts the copies of a forward pass: tensors laid out anew, by a profile of PyTorch.

    python benchmarks/copies.py ravlt_t l2vit_tiny swin_tiny_patch4_window7_224

Counts and MiB are the same on every run and machine with one version of PyTorch; the share of time
is not. Reorderings inside oneDNN's convolutions and products are theirs, and not seen.
"""

from __future__ import annotations

import argparse
from math import prod

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import vitlinear  # noqa: F401  registers the models

# Each makes a tensor of what stands in others. clone, contiguous and pad show as copy_.
COPIES = ("aten::copy_", "aten::cat", "aten::roll")


@torch.no_grad()
def copies_of(model: nn.Module, images: torch.Tensor) -> tuple[int, int, float, float]:
    """Count the copies of one forward pass.

    Returns:
        Copies made by copy_, by cat and roll, MiB that copy_ wrote (of numbers of 4 bytes), and
        the share of all in the time of the operators, from 0 to 1.
    """
    model(images)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
        model(images)
    events = run.events()
    copied = [event for event in events if event.name == COPIES[0]]
    others = [event for event in events if event.name in COPIES[1:]]
    size = sum(prod(event.input_shapes[0]) for event in copied)
    time = sum(event.self_cpu_time_total for event in events)
    share = sum(event.self_cpu_time_total for event in copied + others) / time
    return len(copied), len(others), size * 4 / 2**20, share


def main() -> None:
    """Print a table with a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), help="height and width")
    parser.add_argument("--batch-size", "-b", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.randn(args.batch_size, 3, *args.size)
    print("| model | copies | cat, roll | MiB copied | share of time |")
    print("| --- | --- | --- | --- | --- |")
    for name in args.models:
        model = timm.create_model(name).eval()
        count, others, size, share = copies_of(model, images)
        print(f"| `{name}` | {count} | {others} | {size:.1f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
