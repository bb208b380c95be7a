"""The time that each fast path of `vitlinear.ops.cpu` saves a whole model on this processor.

    python benchmarks/cpu_paths.py ravlt_s ravlt_s_linear inline_swin_tiny nalaformer_t

A path is switched off by putting the plain formula in its place. Passes with all paths and passes
without each of them take turns, on one thread. An operator costs the least CPU time that was seen
of it on tensors of the same shapes and strides, and a pass takes the sum over its operators: so
other work on the machine hardly counts, nor does what Python itself takes. Operators that two kinds
of passes have in common cost the same in both. A result is the time without a path over the time
with all of them: 1.05 is 5 % more time.

Inference is that of the fused model, but for paths that only an unfused one has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

import vitlinear  # noqa: E402, F401  # registers the models
from benchmarks.attention import commit, machine  # noqa: E402
from vitlinear.ops import cpu  # noqa: E402
from vitlinear.ops.cpu import depthwise, feature_maps, in_place, products, rotation  # noqa: E402

PASSES = ("inference", "unfused", "training")
make_product = products.product


class FastPath(NamedTuple):
    """A fast path and what stands in its place when it is off.

    Attributes:
        plain: Modules, names of what they hold, and the plain formulas.
        passes: Where it is measured, of `PASSES`.
    """

    plain: tuple[tuple[Any, str, Any], ...]
    passes: tuple[str, ...]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the plain formulas run."""
        with ExitStack() as stack:
            for module, name, formula in self.plain:
                stack.enter_context(mock.patch.object(module, name, formula))
            yield


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    frozen: bool = False,
) -> Tensor:
    """PyTorch's own linear map."""
    x = F.linear(x, weight, bias)
    return F.gelu(x) if activation == "gelu" else x


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, frozen: bool
) -> Tensor:
    """The product with a GELU after it, not inside."""
    x = make_product(x, weight, bias, "none", frozen)
    return F.gelu(x) if activation == "gelu" else x


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's own depthwise convolution."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def residual_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum after the convolution, not inside."""
    return x + cpu.depthwise_conv(x, weight, bias)


def split_signs(x: Tensor, magnitude: Tensor) -> Tensor:
    """With a choice for each number."""
    return torch.cat([torch.where(s * x > 0, magnitude, 0.0) for s in (1, -1)], dim=-1)


def rotate_pairs(x: Tensor, table: Tensor, inverse: bool = False, *, own: bool = False) -> Tensor:
    """In real numbers."""
    return rotation._real_rotation(x, table, inverse)


def never() -> bool:
    """No tensor may be written to again."""
    return False


IN_PLACE = tuple((module, "keeps_nothing", never) for module in (in_place, rotation, feature_maps))
FAST_PATHS = {
    "linear maps by oneDNN": FastPath(((cpu, "linear", linear),), ("inference", "training")),
    "GELU in the product": FastPath(((products, "product", product),), ("inference",)),
    "weights kept packed": FastPath(((products, "_packed", lambda weight: None),), ("inference",)),
    "the other library where they differ": FastPath(
        ((products, "MKL_KEEPS_UP", not products.MKL_KEEPS_UP),), ("inference", "training")
    ),
    "weight gradients of 5 x 5 kernels": FastPath(
        tuple((module, "depthwise_conv", depthwise_conv) for module in (cpu, depthwise)),
        ("training",),
    ),
    "x + conv(x) in the kernel": FastPath(
        ((cpu, "residual_depthwise_conv", residual_depthwise_conv),), ("unfused", "training")
    ),
    "elu + 1 as an exponential": FastPath(
        ((cpu, "elu_plus_one", lambda x: F.elu(x) + 1),), ("inference", "training")
    ),
    "signs without branches": FastPath(
        ((cpu, "split_signs", split_signs),), ("inference", "training")
    ),
    "writing in place": FastPath(IN_PLACE, ("inference",)),
    "complex rotation": FastPath(((cpu, "rotate_pairs", rotate_pairs),), ("inference", "training")),
}


def signature(x: Any) -> Any:
    """An argument of an operator, as far as its time depends on it."""
    if isinstance(x, Tensor):
        return x.dtype, x.shape, x.stride()
    return tuple(map(signature, x)) if isinstance(x, list | tuple) else x


class Clock(TorchDispatchMode):
    """Takes the CPU time of each operator.

    Attributes:
        calls: How often each operator was called in the last pass, by operator and arguments.
        least: Nanoseconds that each of these took at least, in all passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()
        self.least: dict[Any, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        what = (func, signature(args), signature(sorted(kwargs.items())))
        start = time.thread_time_ns()
        out = func(*args, **kwargs)
        took = time.thread_time_ns() - start
        self.least[what] = min(took, self.least.get(what, took))
        self.calls[what] += 1
        return out


def make_pass(name: str, kind: str, images: Tensor) -> Callable[[Clock], None]:
    """A pass of a model with random weights, under a clock."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name).train(kind == "training")
    if kind == "inference":
        model.fuse()

    def run(clock: Clock) -> None:
        clock.calls.clear()
        with clock, torch.set_grad_enabled(kind == "training"):
            out = model(images)
            if kind == "training":
                out.square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def measure(run: Callable[[Clock], None], paths: dict[str, FastPath], turns: int) -> dict[str, Any]:
    """Seconds of a pass with all paths, and the ratio without each of them."""
    on, off = Clock(), {name: Clock() for name in paths}
    run(Clock())  # packs weights
    for _ in range(turns):
        run(on)
        for name, path in paths.items():
            with path.off():
                run(off[name])
    whole = sum(count * on.least[what] for what, count in on.calls.items())
    without = {}
    for name, clock in off.items():
        least = {**on.least, **clock.least}
        for what in on.least.keys() & clock.least.keys():
            least[what] = min(on.least[what], clock.least[what])
        more, less = clock.calls - on.calls, on.calls - clock.calls
        change = sum(more[what] * least[what] for what in more)
        change -= sum(less[what] * least[what] for what in less)
        without[name] = round(1 + change / whole, 4)
    return {"seconds": whole / 1e9, "without": without}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224], help="sides of the image")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--only", nargs="+", choices=FAST_PATHS, default=list(FAST_PATHS))
    parser.add_argument("-b", "--batch-size", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        images = torch.randn(args.batch_size, 3, size, size)
        for kind in args.passes:
            paths = {name: FAST_PATHS[name] for name in args.only}
            paths = {name: path for name, path in paths.items() if kind in path.passes}
            for model in args.models if paths else ():
                found = measure(make_pass(model, kind, images), paths, args.turns)
                rows.append({"model": model, "size": size, "pass": kind, **found})
                print(f"{model}, {size}, {kind}: {found['seconds']:.3f} s", flush=True)
                for name, ratio in found["without"].items():
                    print(f"    without {name}: {ratio:.3f}", flush=True)
    if args.output:
        told = {"command": " ".join(["python", *sys.argv]), "machine": machine()}
        result = {**told, "commit": commit(), "torch": torch.__version__, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
