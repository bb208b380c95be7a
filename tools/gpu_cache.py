"""Kernels compiled before there is a GPU: as Triton's own cache, packed to be carried along.

    python3.12 tools/gpu_cache.py make output/gpu_cache.tar.xz        # needs torch, triton, gcc
    python3.12 tools/gpu_cache.py unpack output/gpu_cache.tar.xz FOLDER    # TRITON_CACHE_DIR
    python3.12 tools/gpu_cache.py verify FOLDER        # compiles nothing if everything is there
    python3.12 tools/gpu_cache.py compile FOLDER       # what is not there, for the GPU of here

Triton finds a kernel by a hash of its source, of itself (libtriton.so is another for each Python)
and of the target. So ``make`` has to run under the Python and the Triton of the machine with the
GPU, from the same sources of the kernels; the archive says which. It makes the calls of
`benchmarks/first_contact.py` and the tests for a GPU that is not there (sm_90 by default), builds
the launchers that Triton would compile with gcc, and stops at an archive larger than 64 MiB. Each
mechanism is a process of its own, ``--jobs`` of them at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

MOST = 64 * 2**20  # bytes of the archive
GROUP = "__grp__"  # a file that lists the files of a kernel by their paths
ABOUT = "about.json"
PARTS = ("first", "tests")
SOURCES = Path(__file__).resolve().parent.parent / "vitlinear" / "ops" / "triton"


class Wanted(NamedTuple):
    """The kernels that are wanted.

    Attributes:
        target: Compute capability, two digits.
        processors: Of the GPU: they decide how calls are cut.
        parts: Of the calls: those of first_contact.py, and those of the tests.
        mechanisms: Keys in `MECHANISMS`; None for all.
        jobs: Processes at a time.
    """

    target: int
    processors: int
    parts: tuple[str, ...]
    mechanisms: list[str] | None
    jobs: int


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make_flags = commands.add_parser("make", help="compile and pack")
    make_flags.add_argument("archive", type=Path)
    unpack_flags = commands.add_parser("unpack", help="put an archive where Triton finds it")
    unpack_flags.add_argument("archive", type=Path)
    unpack_flags.add_argument("folder", type=Path)
    verify_flags = commands.add_parser("verify", help="make the calls again and count")
    verify_flags.add_argument("folder", type=Path)
    compile_flags = commands.add_parser("compile", help="compile what is not there, unpacked")
    compile_flags.add_argument("folder", type=Path)
    for flags in (make_flags, verify_flags, compile_flags):
        flags.add_argument("--target", type=int, default=90, help="compute capability")
        flags.add_argument("--processors", type=int, default=132, help="of the GPU")
        flags.add_argument("--only", choices=PARTS, default=None, help="of the calls")
        flags.add_argument("--mechanisms", nargs="+", default=None, metavar="M", help="these alone")
        flags.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    args = parser.parse_args()
    if args.command == "unpack":
        unpack(args.archive, args.folder)
        return
    parts = PARTS if args.only is None else (args.only,)
    wanted = Wanted(args.target, args.processors, parts, args.mechanisms, args.jobs)
    if args.command == "make":
        make(args.archive, wanted)
    elif args.command == "compile":
        found, compiled = compile_calls(args.folder.resolve(), for_this_gpu(wanted))
        print(f"{found} kernels found, {compiled} compiled")
    else:
        verify(args.folder, wanted)


def for_this_gpu(wanted: Wanted) -> Wanted:
    """The same for the GPU that is here, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return wanted
    here = torch.cuda.get_device_properties(0)
    target = 10 * here.major + here.minor
    return wanted._replace(target=target, processors=here.multi_processor_count)


def make(archive: Path, wanted: Wanted) -> None:
    """Compile for a target and pack what came of it."""
    if archive.parent != Path() and not archive.parent.is_dir():
        archive.parent.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        cache, made_of = Path(folder) / "cache", environment()
        compile_calls(cache, wanted)
        number = sum(1 for _ in cache.rglob("*.cubin"))
        about = {**made_of, "target": f"sm_{wanted.target}", "number": number}
        (cache / ABOUT).write_text(json.dumps(about) + "\n")
        unfinished = archive.with_name(f".{archive.name}.partial")
        try:
            with tarfile.open(unfinished, "w:xz") as tar:
                for path in sorted(cache.rglob("*")):
                    if path.is_file():
                        tar.add(path, path.relative_to(cache))
            size = unfinished.stat().st_size
            if size > MOST:
                sys.exit(f"error: {size / 2**20:.0f} MiB packed are more than {MOST >> 20} MiB")
            unfinished.replace(archive)
        finally:
            unfinished.unlink(missing_ok=True)
    print(f"{number} kernels, {size / 2**20:.1f} MiB in {archive}: {json.dumps(about)}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack, with the paths that Triton wants to find inside of the files."""
    folder = folder.resolve()
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        sys.exit(f"error: cannot unpack {archive}: {error}")
    for path in folder.glob(f"*/{GROUP}*"):
        content = json.loads(path.read_text())
        names = content["child_paths"]
        content["child_paths"] = {name: str(path.parent / name) for name in names}
        path.write_text(json.dumps(content))
    about, here = json.loads((folder / ABOUT).read_text()), environment()
    differs = [f"{key} {here[key]}, not {about[key]}" for key in here if here[key] != about[key]]
    if differs:
        sys.exit(f"error: Triton will not find these kernels here: {'; '.join(differs)}")
    print(f"{about['number']} kernels for {about['target']} in {folder}")


def verify(folder: Path, wanted: Wanted) -> None:
    """Make the calls over an unpacked cache; exit status 1 if anything had to be compiled."""
    found, compiled = compile_calls(folder.resolve(), wanted)
    print(f"{found} kernels found, {compiled} compiled")
    sys.exit(1 if compiled or not found else 0)


def environment() -> dict[str, str]:
    """All that Triton's keys depend on besides the target."""
    import triton

    sources = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.py")):
        sources.update(path.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "triton": triton.__version__, "kernels": sources.hexdigest()[:12]}


def compile_calls(cache: Path, wanted: Wanted) -> tuple[int, int]:
    """Make all calls for a GPU that is not there; kernels found in the cache, and compiled.

    A kernel that two processes call is counted in both.
    """
    from vitlinear import ops

    cache.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("error: TRITON_INTERPRET is set, and interpreted kernels are not compiled")
    names = wanted.mechanisms or list(ops.MECHANISMS)
    tasks = [wanted._replace(mechanisms=[name]) for name in names]
    found = compiled = 0
    with ProcessPoolExecutor(wanted.jobs, multiprocessing.get_context("spawn")) as pool:
        for task, counts in zip(tasks, pool.map(compile_some, tasks), strict=True):
            found, compiled = found + counts[0], compiled + counts[1]
            line = f"{task.mechanisms[0]}: {counts[0]} kernels found, {counts[1]} compiled"
            print(line, file=sys.stderr, flush=True)
    return found, compiled


def compile_some(wanted: Wanted) -> tuple[int, int]:
    """The same in one process, into the folder that the environment names."""
    from benchmarks.first_contact import CacheCount
    from vitlinear.ops.triton import kept

    kept.asked_for = "0"
    count = CacheCount()
    count.listen()
    with no_gpu(wanted):
        for call in calls(wanted):
            call()
    return count.found, count.compiled


def calls(wanted: Wanted) -> Iterator[Callable[[], Any]]:
    """The calls whose kernels are wanted."""
    import torch

    from benchmarks import first_contact, gpu_rows
    from vitlinear import ops
    from vitlinear.ops import self_check

    cpu = torch.device("cpu")
    names = ops.MECHANISMS if wanted.mechanisms is None else wanted.mechanisms
    barred = first_contact.barred_shapes(dry=False)
    if "first" in wanted.parts:
        for check in first_contact.checks("cpu", dry=False):
            if check.kind.mechanism in names:
                yield partial(self_check.run_kernels, check.kind, check.grid)
        shapes = barred
    if "tests" in wanted.parts:
        yield from _tests(names)
        shapes = gpu_rows.SHAPES if "first" in wanted.parts else gpu_rows.SHAPES[len(barred) :]
    for shape in shapes:
        if shape.mechanism in names:
            yield first_contact.attention(shape, cpu, torch.bfloat16, compiled_only=True)


def _tests(names: Iterable[str]) -> Iterator[Callable[[], Any]]:
    """The kinds of call of tests/ops/triton/test_gpu.py."""
    import torch

    from tests.ops.inputs import make_inputs
    from tests.ops.triton.cases import run
    from vitlinear import ops

    half = torch.bfloat16
    types = (torch.float32, half, torch.float16)
    alone = {"heads": 1, "batch": 1}  # as `many_tokens` there makes them
    epilogue = {"dtype": half, "mask": True, "epilogue": ("lepe", "gate")}
    for mechanism in names:
        for grid, dim, options in (
            *(((14, 14), 32, {"dtype": dtype}) for dtype in types),
            *(((7, 9), dim, {"dtype": half}) for dim in (8, 20, 64, 128)),
            *(((40, 40), 32, {"dtype": dtype, **alone}) for dtype in types),
            ((56, 56), 64, {"dtype": half, **alone}),
            *((grid, 32, epilogue) for grid in ((9, 11), (40, 41))),
        ):
            inputs: Any = make_inputs(grid=grid, dim=dim, **options)
            yield partial(run, mechanism, inputs)
        for layout in ("channels first", "heads first"):
            yield partial(run, mechanism, make_inputs(grid=(9, 11), dim=32, dtype=half), layout)
        for side in (8, 56):
            inputs = make_inputs(
                grid=(side, side), dim=32, dtype=torch.float32, mask=True, batch=3, heads=1
            )
            yield partial(run, mechanism, inputs._replace(head_scale=torch.tensor([-1.5])))
        if mechanism in ("elu", "rala"):
            for grid in ((9, 11), (40, 41)):
                inputs = make_inputs(grid=grid, dim=32, dtype=half)
                tables = ops.full_width_rotary_tables(*grid, 64)
                yield partial(run, mechanism, inputs._replace(rotary=tables))
        if mechanism in ("identity", "mala", "pola", "lightnet"):
            for dtype in (torch.float32, half):
                for side in (9, 56):
                    inputs = make_inputs(grid=(side, side), dim=32, dtype=dtype)
                    yield partial(_states, mechanism, inputs)
        if mechanism in ("identity", "pola"):
            for width in (16, 128):
                for side in (9, 56):
                    inputs = make_inputs(grid=(side, side), dim=32, dtype=torch.float32)
                    yield partial(_other_width, mechanism, inputs, width)


def _states(mechanism: str, inputs: Any) -> None:
    """A state that is returned and a read of it, forward and backward."""
    import torch

    from vitlinear import ops

    q, k, v = (x.detach().requires_grad_() for x in inputs.projection.unbind(2)[:3])
    terms = inputs.terms(mechanism)
    options = {"rotary": terms.rotary, "powers": terms.powers, "backend": "triton"}
    state = ops.linear_attention_state(k, v, mechanism=mechanism, **options)
    out = ops.read_linear_attention_state(q, state, mechanism=mechanism, **options)
    torch.autograd.grad(out, (q, k, v), inputs.grad)


def _other_width(mechanism: str, inputs: Any, width: int) -> None:
    """Values of another width than queries and keys."""
    import torch

    from vitlinear import ops

    q, k = (x.detach().requires_grad_() for x in inputs.projection.unbind(2)[:2])
    v = torch.zeros(*q.shape[:3], width, dtype=q.dtype, requires_grad=True)
    powers = inputs.terms(mechanism).powers
    given = [q, k, v, *([] if powers is None else [powers.requires_grad_()])]
    out = ops.linear_attention(q, k, v, mechanism=mechanism, powers=powers, backend="triton")
    torch.autograd.grad(out, given, torch.zeros_like(out))


@contextmanager
def no_gpu(wanted: Wanted) -> Iterator[None]:
    """Let calls on tensors of the CPU compile for a GPU, up to the launch."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build, driver
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction

    from vitlinear.ops import backend
    from vitlinear.ops.triton import calls, tuning

    class Driver:
        """A driver for a GPU that is not there."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", wanted.target, 32)

    limits = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB of shared memory a block may have
    most = 1024 * limits.get(wanted.target, 99)
    compile_and_launch, before = JITFunction.run, _patched_names(backend, calls, build, nvidia)
    launchers: set[str] = set()

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.metadata.shared > most:
            raise OutOfResources(kernel.metadata.shared, most, "shared memory")
        if kernel.hash not in launchers:
            launchers.add(kernel.hash)
            nvidia.CudaLauncher(kernel.src, kernel.metadata)
        return kernel

    JITFunction.run = only_compile
    backend.find_obstacle = lambda work: None
    calls.processors = lambda device: wanted.processors
    tuning._chosen.clear()
    with tempfile.TemporaryDirectory() as stubs:
        # What launchers are linked with is on the machine with the GPU; here, its name is enough.
        stub = Path(stubs) / "libcuda.so.1"
        (Path(stubs) / "empty.c").write_text("")
        subprocess.run(
            ["gcc", "-shared", f"-Wl,-soname,{stub.name}", "-o", stub, f"{stubs}/empty.c"],
            check=True,
        )
        nvidia.library_dirs = lambda: [stubs]
        build._load_module_from_path = lambda name, path: _Unloaded()
        driver.set_active(Driver())
        try:
            nvidia.CudaUtils()
            yield
        finally:
            driver.set_active(None)
            JITFunction.run = compile_and_launch
            for (module, name), value in before.items():
                setattr(module, name, value)


class _Unloaded:
    """A module that was compiled and is not loaded: it has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        return None


def _patched_names(backend: Any, calls: Any, build: Any, nvidia: Any) -> dict[Any, Any]:
    names = (
        (backend, "find_obstacle"), (calls, "processors"), (build, "_load_module_from_path"),
        (nvidia, "library_dirs"),
    )  # fmt: skip
    return {(module, name): getattr(module, name) for module, name in names}


if __name__ == "__main__":
    main()
