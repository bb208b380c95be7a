"""Block sizes: a fixed choice, or the fastest of a few, measured once for a kind of call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from . import kept
from .blocks import INTERPRETING
from .plan import Plan


class Config(NamedTuple):
    """The configuration in which a kernel is compiled for a plan.

    Attributes:
        block_tokens: Tokens that a program holds at once.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline.
        max_registers: The most registers of a thread; 0 lets the compiler choose.
    """

    block_tokens: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


TWO_PROGRAMS = 65536 // (2 * 8 * 32)  # registers of a thread of two programs of eight warps

# Passes over keys with sums in TF32, by key map and head size, that Triton's compiler gives 64
# registers before Hopper, where they spill two; with this limit they do not.
SPILLING = {("elu+1", 64), ("identity", 32)}
WITHOUT_SPILLS = 72

_chosen: dict[object, Config] = {}


def candidates(plan: Plan, kernel: str = "") -> list[Config]:
    """Configurations of a kernel worth trying, the fixed one first, smaller ones last.

    Three stages load a block while the one before is computed; two load nothing ahead. The fixed
    choice is the largest at which no kernel of a published model spills registers
    (benchmarks/accounts/kernels.md). A state of 128 x 64 or more takes the registers of eight
    warps; products in full float32 run without tensor cores and want small blocks. So does the
    pass over queries (backward) with a larger state, a gate, two reads or sums in TF32, which keeps
    more of each token than other kernels.

    A state of 128 x 128 leaves room for one program. Before Hopper the compiler fits that pass into
    the registers of sixteen warps; for Hopper it spills there.

    With 128 registers a thread two programs of eight warps share a processor. Those kernels have
    that limit that the compiler would give a few more, and that spill nothing without them.
    """
    if INTERPRETING:
        return [Config(plan.window or 32, 4, 1)]
    ieee = "ieee" in (plan.sums, plan.reads)
    if plan.window:
        return _for_windows(plan, ieee)
    wide = plan.entries >= 128 * 64
    sizes: list[tuple[int, ...]]
    if ieee:
        sizes = [(32, 8, 1), (16, 8, 1)] if wide else [(32, 4, 2), (64, 8, 1), (16, 4, 1)]
        return [Config(*size) for size in sizes]
    if wide:
        sizes = [(32, 8, 3), (64, 8, 3), (64, 8, 2), (32, 8, 1), (16, 8, 1)]
    elif plan.is_small:
        sizes = [(32, 4, 3), (64, 4, 3), (64, 8, 3), (128, 8, 2), (32, 4, 1)]
    else:
        sizes = [(32, 8, 3), (64, 8, 3), (32, 4, 3), (64, 8, 2), (128, 8, 2), (16, 4, 1)]
    if plan.reads_opposite or wide:
        if kernel == "query_kernel":
            shares = plan.expansion == 1 and plan.value_dim <= 64 and plan.sums == "bf16"
            sizes = [(16, 8, 3, TWO_PROGRAMS if shares else 0), *sizes]
            whole = plan.expansion == 1 and not plan.reads_opposite
            if plan.entries > 128 * 64 and whole and _before_hopper():
                sizes = [(16, 16, 3), *sizes]
    elif plan.sums == "tf32":
        if kernel == "query_kernel":
            sizes = [(16, sizes[0][1], 3), *sizes]
        elif kernel == "state_kernel" and _spills(plan):
            sizes = [(*sizes[0], WITHOUT_SPILLS), *sizes]
    elif not plan.is_small and plan.sums == "bf16":
        if kernel == "query_kernel" and plan.has_gate:
            sizes = [(16, 8, 3, TWO_PROGRAMS), *sizes]
        elif kernel in ("query_kernel", "key_kernel") or (
            kernel == "backward_kernel" and not plan.has_gate
        ):
            sizes = [(32, 8, 3, TWO_PROGRAMS), *sizes]
    return [Config(*size) for size in sizes]


def _spills(plan: Plan) -> bool:
    """Whether a pass over keys, with sums in TF32, is one of `SPILLING`."""
    plain = plan.uses_norm and plan.positions == "none" and not plan.has_mask
    return plain and (plan.key_map, plan.head_dim) in SPILLING and _before_hopper()


def _before_hopper() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU older than Hopper."""
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch < 90


def _for_windows(plan: Plan, ieee: bool) -> list[Config]:
    """Likewise for programs that take one short map after the other, each in one block."""
    block, warps = plan.window, plan.window_warps
    if ieee:
        return [Config(block, warps, 1), Config(block, 8, 1)]
    limit = TWO_PROGRAMS if plan.sums == "bf16" else 0
    return [
        Config(block, warps, 3, limit), Config(block, warps, 2, limit), Config(block, 8, 3),
        Config(block, 8, 1),
    ]  # fmt: skip


def limited(config: Config) -> dict[str, int]:
    """The option of a launch for the limit of registers, which NVIDIA's compiler alone takes."""
    if config.max_registers and driver.active.get_current_target().backend == "cuda":
        return {"maxnreg": config.max_registers}
    return {}


def _candidates(key: Any, plan: Plan) -> list[Config]:
    """Those of the kernel whose name begins the key."""
    return candidates(plan, key[0])


def is_fixed() -> bool:
    """Whether block sizes depend on the plan alone: unless a user asks for measured ones.

    Measuring compiles each kernel several times, which takes longer than many programs run.
    """
    return INTERPRETING or kept.asked_for != "1" or torch.are_deterministic_algorithms_enabled()


def name(key: object, plan: Plan, fixed: bool) -> object:
    """The name that a choice goes by: a measurement counts only where measuring is allowed."""
    return ("fixed", key) if fixed or plan.adds else key


def chosen(name: object) -> Config | None:
    """The configuration that `run` would take, if there is one already."""
    return _chosen.get(name)


def forget(name: object, key: object) -> None:
    """Choose anew for this key."""
    _chosen.pop(name, None)
    _chosen.pop(("fixed", key), None)


def run(key: object, plan: Plan, call: Callable[[Config], None]) -> None:
    """Run a kernel in the configuration for this key; measure if it is the first time.

    Nothing is measured while a graph is captured: a capture takes what was measured before it, or
    else the fixed choice.

    Args:
        key: What the choice may depend on; never the number of tokens itself, or each resolution
            would be measured anew.
        plan: The plan without a block size.
        call: Launches the kernel, which overwrites whatever it wrote before, unless the plan adds:
            then nothing is measured.

    Raises:
        OutOfResources: Not even the smallest configuration fits the device.
    """
    goes_by = name(key, plan, is_fixed())
    config = _chosen.get(goes_by)
    if config is not None:
        call(config)
    elif goes_by is not key or torch.cuda.is_current_stream_capturing():
        _run_fixed(key, plan, call)
    else:
        try:
            config = _chosen[key] = _measured(_candidates(key, plan), call)
        except torch.OutOfMemoryError:  # for the measurement: the kernel itself takes no memory
            _chosen[key] = _run_fixed(key, plan, call)
        else:
            kept.note(key, config)
            call(config)


def _ready(key: Any, plan: Plan) -> list[Config]:
    """Configurations in the order in which they are tried: first what an earlier run measured."""
    measured = kept.find(key)
    configs = _candidates(key, plan)
    return configs if measured is None else [Config(*measured), *configs]


def _run_fixed(key: object, plan: Plan, call: Callable[[Config], None]) -> Config:
    """Run the first configuration that fits the device, and return it."""
    known = _chosen.get(("fixed", key))
    configs = _ready(key, plan) if known is None else [known]
    for config in configs[:-1]:
        try:
            call(config)
        except OutOfResources:
            continue
        break
    else:
        config = configs[-1]
        call(config)
    _chosen["fixed", key] = config
    return config


def _measured(configs: list[Config], call: Callable[[Config], None]) -> Config:
    """The fastest configuration among those that fit."""
    times: dict[Config, float] = {}
    for config in configs:
        try:
            call(config)
            times[config] = do_bench(lambda c=config: call(c), warmup=5, rep=20)  # type: ignore[misc]
        except OutOfResources:
            if config == configs[-1] and not times:
                raise
    return min(times, key=lambda config: times[config])
