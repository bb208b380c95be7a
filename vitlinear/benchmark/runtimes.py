"""The runtimes: a program made ready in each, and the times of its parts by the runtime itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitlinear.errors import UserError, pip_install
from vitlinear.layers.layout import KEEP_LAYOUT

from .programs import Size, fused, images

Run = Callable[[], np.ndarray]
ONNX_TYPES = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(double)": "f8"}
PROFILED = 3  # calls, of which the fastest counts
# Of a file that OpenVINO has read.
OPENVINO_PRODUCTS = ("MatMul", "Einsum", "ScaledDotProductAttention")
# How runtimes name what multiplies: products of matrices, convolutions, softmax attention.
MULTIPLIES = {
    # Whole words of a name: `upsample_bilinear2d` and `cummax` are no products.
    "pytorch": r"^(?!.*(?:reorder|pack(?!ed))).*(?<![a-z\d])([a-z]*mm|[a-z]*mv|v?dot|matmul|einsum|"
    r"q?linear|q?conv(?:[123]d)?|convolution|attention|sdpa)(?![a-z\d])",
    "onnxruntime": r"MatMul|Gemm(?!a)|Conv|Einsum|Attention(?!Gate)",
    "openvino": r"FullyConnected|MatMul|Convolution|ScaledDotProductAttention",
}


@dataclasses.dataclass(frozen=True)
class Ready:
    """A program that is ready to run.

    Attributes:
        run: Runs it on the images of its size and returns the logits, [B, classes].
        profile: Milliseconds of the fastest of some calls, by the runtime's own kinds of node.
    """

    run: Run
    profile: Callable[[], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A runtime.

    Attributes:
        packages: What has to be installed.
        extra: Extras of this package that bring them.
        takes_files: Whether it runs ONNX; otherwise it runs models by their names.
        prepare: Makes a program ready: the model's name, the ONNX file, size and threads.
    """

    packages: tuple[str, ...]
    extra: str
    takes_files: bool
    prepare: Callable[[str, str, Size, int], Ready]


def _fastest(calls: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    kinds = min(calls, key=lambda call: sum(call.values()))
    return dict(sorted(kinds.items(), key=lambda kind: -kind[1]))


def _pytorch(name: str, file: str, size: Size, threads: int, compiled: bool = False) -> Ready:
    torch.set_num_threads(threads)
    model, x = fused(name, size), images(size)
    if compiled:
        ours = type(model).__module__.startswith("vitlinear.")
        model = torch.compile(model, options=KEEP_LAYOUT if ours else None)  # type: ignore[assignment]

    def run() -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = model(x).numpy()
        return logits

    def profile() -> Mapping[str, float]:
        activities, calls = [torch.profiler.ProfilerActivity.CPU], []
        for _ in range(PROFILED):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning: Profiler clears events")
                with torch.profiler.profile(activities=activities) as trace:
                    run()
            averages = trace.key_averages()
            calls.append({each.key: each.self_cpu_time_total / 1e3 for each in averages})
        return _fastest(calls)

    return Ready(run, profile)


def _compiled(name: str, file: str, size: Size, threads: int) -> Ready:
    return _pytorch(name, file, size, threads, compiled=True)


def _onnxruntime(name: str, file: str, size: Size, threads: int) -> Ready:
    import onnxruntime

    x = images(size).numpy()

    def session(**options: Any) -> Any:
        chosen = onnxruntime.SessionOptions()
        chosen.intra_op_num_threads = threads
        for key, value in options.items():
            setattr(chosen, key, value)
        return onnxruntime.InferenceSession(file, chosen, providers=["CPUExecutionProvider"])

    plain = session()
    (taken, *_) = plain.get_inputs()
    feed = {taken.name: x.astype(ONNX_TYPES[taken.type])}

    def run() -> np.ndarray:
        logits: np.ndarray = plain.run(None, feed)[0]
        return logits

    def profile() -> Mapping[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            measured = session(enable_profiling=True, profile_file_prefix=f"{folder}/trace")
            for _ in range(1 + PROFILED):
                measured.run(None, feed)
            trace = json.loads(Path(measured.end_profiling()).read_text(encoding="utf-8"))
        of_node: dict[str, list[tuple[str, float]]] = {}
        for event in trace:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                kind, ms = event["args"]["op_name"], event["dur"] / 1e3
                of_node.setdefault(event["name"], []).append((kind, ms))
        calls = [defaultdict[str, float](float) for _ in range(1 + PROFILED)]
        for events in of_node.values():  # several a call if they are in a loop, or share a name
            for at, (kind, ms) in enumerate(events):
                calls[at * len(calls) // len(events)][kind] += ms
        return _fastest(calls[1:])  # the first one allocates

    return Ready(run, profile)


def _steps_with_products(file: Any, compiled: Any) -> set[str]:
    """Names of the steps of OpenVINO that hold a product.

    It puts a softmax attention into one step, and chains of steps that multiply nothing too. What
    it knows of a step are names of the file. A product that is scaled by a constant loses its name
    to the scaling.

    Args:
        file: The model as it was read.
        compiled: What was made of it.
    """
    products = set()
    for op in file.get_ops():
        if op.get_type_name() in OPENVINO_PRODUCTS:
            products.add(op.get_friendly_name())
            for after in (user.get_node() for user in op.output(0).get_target_inputs()):
                read = {value.get_node().get_type_name() for value in after.input_values()}
                if after.get_type_name() == "Multiply" and "Constant" in read:
                    products.add(after.get_friendly_name())
    return {
        step.get_friendly_name()
        for step in compiled.get_runtime_model().get_ops()
        if products.intersection(step.get_rt_info()["originalLayersNames"].astype(str).split(","))
    }


def _openvino(name: str, file: str, size: Size, threads: int) -> Ready:
    import openvino

    x = images(size).numpy()

    def compiled(**options: Any) -> tuple[Any, Any]:
        core = openvino.Core()
        model = core.read_model(file)
        if model.is_dynamic():
            model.reshape(list(x.shape))
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # Of processors with bfloat16 it would take that otherwise.
            "INFERENCE_PRECISION_HINT": "f32",
            **options,
        }
        return model, core.compile_model(model, "CPU", settings)

    plain = compiled()[1].create_infer_request()
    x = x.astype(plain.model_inputs[0].element_type.to_dtype())

    def run() -> np.ndarray:
        logits: np.ndarray = plain.infer({0: x})[0]
        return logits

    def profile() -> Mapping[str, float]:
        model, program = compiled(PERF_COUNT=True)
        multiply = _steps_with_products(model, program)
        measured, calls = program.create_infer_request(), []
        measured.infer({0: x})  # allocates
        for _ in range(PROFILED):
            measured.infer({0: x})
            kinds: dict[str, float] = defaultdict(float)
            for node in measured.profiling_info:
                if node.status == node.Status.EXECUTED:
                    kind = node.node_type
                    if kind == "Subgraph" and node.node_name in multiply:
                        kind = "Subgraph with MatMul"
                    kinds[kind] += node.real_time.total_seconds() * 1e3
            calls.append(kinds)
        return _fastest(calls)

    return Ready(run, profile)


FILES = ("onnx", "onnxscript", "onnxruntime")  # write and verify ONNX
RUNTIMES = {
    "pytorch": Runtime((), "", False, _pytorch),
    "pytorch-compiled": Runtime((), "", False, _compiled),
    "onnxruntime": Runtime(FILES, "export", True, _onnxruntime),
    "openvino": Runtime((*FILES, "openvino"), "export,openvino", True, _openvino),
}


def check_runtime(name: str) -> None:
    """Raises `UserError` if what a runtime needs is not installed."""
    runtime = RUNTIMES[name]
    missing = [each for each in runtime.packages if importlib.util.find_spec(each) is None]
    if missing:
        raise UserError(
            f"--runtime {name} needs {', '.join(missing)}: {pip_install(runtime.extra)}"
        )


def multiplying(runtime: str, kinds: Mapping[str, float]) -> float:
    """Milliseconds of a profile in products, convolutions and softmax attention."""
    pattern = MULTIPLIES[runtime.partition("-")[0]]
    # Of an operator of PyTorch, the part before :: is the library that it is from.
    names = {kind: kind.rpartition("::")[2] for kind in kinds}
    return sum(ms for kind, ms in kinds.items() if re.search(pattern, names[kind]))
