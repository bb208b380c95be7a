"""Compiles every kernel of a call for a GPU that is not there: Triton needs none until it runs.

Arguments are specialised as a launch would do it: unit strides and None are compile-time constants,
pointers and other numbers divisible by 16 say so, run-time arguments say nothing.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitlinear import ops
from vitlinear.ops.triton import launch, tuning

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}
HOPPER = GPUTarget("cuda", 90, 32)


def _describe(value: Any, path: tuple[int, ...], run_time: bool, found: dict[str, Any]) -> Any:
    """The type of an argument; constants and divisibility go into ``found`` by path."""
    if isinstance(value, tuple):
        return tuple(_describe(x, (*path, i), run_time, found) for i, x in enumerate(value))
    if isinstance(value, torch.Tensor):
        found["attrs"][path] = [["tt.divisibility", 16]]
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or (value == 1 and not run_time):
        found["constexprs"][path] = value
        return "constexpr"
    if value % 16 == 0 and not run_time:
        found["attrs"][path] = [["tt.divisibility", 16]]
    return "i32"


def compile_kernel(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], **options: int
) -> Any:
    """The compiled kernel; its ``metadata.shared`` is the shared memory that it wants."""
    names = list(inspect.signature(kernel.fn).parameters)
    found: dict[str, Any] = {"constexprs": {}, "attrs": {}}
    signature = {
        name: _describe(value, (i,), name in kernel.do_not_specialize, found)
        for i, (name, value) in enumerate(zip(names, args, strict=False))
    }
    for name, value in constants.items():
        signature[name] = "constexpr"
        found["constexprs"][(names.index(name),)] = value
    source = ASTSource(kernel, signature, found["constexprs"], found["attrs"])
    return triton.compile(source, target=HOPPER, options=options)


class Recorder(list):  # of (kernel, arguments, constants, plan)
    """Takes the place of `Call.launch` and of the merge kernel, and keeps what they were given."""

    def record(self, call: Any, kernel: Any, splits: int, *args: Any, **constants: Any) -> None:
        self.append((kernel, args, constants, call.plan))

    def record_merge(self, call: Any, *args: Any) -> None:
        parts, sums, statistic_parts, statistics = (*args, None, None)[:4]
        kernel = launch.forward_kernels.merge_kernel
        args = (parts, statistic_parts, sums, statistics, 2)
        constants = {"softmax": statistics is not None, "block": launch.MERGE_BLOCK}
        self.append((kernel, args, constants, call.plan))


def record_call(
    monkeypatch: Any,
    mechanism: str,
    dtype: torch.dtype,
    dim: int,
    length_side: int,
    **options: bool,
) -> Recorder:
    """The launches of a forward and a backward pass, made on the CPU and not run."""
    recorder = Recorder()
    monkeypatch.setattr(launch.Call, "launch", lambda call, *a, **c: recorder.record(call, *a, **c))
    monkeypatch.setattr(launch.Call, "merge", lambda call, *a: recorder.record_merge(call, *a))
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    side, row = length_side, ops.get_mechanism(mechanism)
    qkv = torch.zeros(2, side * side, 3, 2, dim, dtype=dtype)
    q, k, v = qkv.unbind(2)
    tables = ops.lrpe_tables if row.positions == "cosine" else ops.rotary_tables
    rows, cols = tables(side, side, dim) if options.get("rotary", True) else (None, None)
    mask = torch.zeros(2, side * side, dtype=torch.bool) if options.get("mask") else None
    scale = torch.ones(2) if options.get("head_scale") else None
    out, *saved = launch.forward(q, k, v, rows, cols, mask, scale, row)
    grads = torch.empty_like(qkv).unbind(2)
    launch.backward(out, q, k, v, rows, cols, mask, scale, *saved, row, grads)
    return recorder


def compile_call(recorder: Recorder, shared_memory: int) -> list[tuple[str, Any]]:
    """Compile what was recorded, each in the first configuration of `tuning` that fits."""
    compiled = []
    for kernel, args, constants, plan in recorder:
        name = kernel.fn.__name__
        for chosen in tuning.candidates(plan):
            full = {**constants, "plan": replace(plan, block_tokens=chosen.block_tokens)}
            options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
            binary = compile_kernel(kernel, args, full, **options)
            if binary.metadata.shared <= shared_memory:
                compiled.append((name, binary))
                break
        else:
            raise AssertionError(f"no configuration of {name} fits {plan}")
    return compiled
