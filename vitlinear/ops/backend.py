"""The choice of the implementation that runs an attention, and its reason.

``eager``    the formulas of `vitlinear.ops.eager`: any derivative, fused by `torch.compile`,
             exported to anything.
``library``  the registered operators of `vitlinear.ops.registered` with closed-form formulas: keep
             only q, k and v for backward, opaque to compilers.
``triton``   the same operators with fused GPU kernels (`vitlinear.ops.triton`). float64 runs the
             eager formula.
``auto``     what the environment variable ``VITLINEAR_BACKEND`` says. Else, on a GPU, ``triton``
             where the kernels can run, are faster, and have passed their self-check: faster as the
             user's own measurements say (`vitlinear tune`), or those that ship for this very GPU,
             or, without either, from a number of tokens on. ``eager`` everywhere else: on CPUs it
             is about as fast as ``library`` (benchmarks/README.md) and can do more.

Modules take the choice for linear attention; their softmax stages always run on SDPA. With
``TRITON_INTERPRET=1`` in the environment the kernels run in Triton's interpreter, on CPU tensors:
slow, for tests.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from vitlinear.errors import Notice, UserError

from . import gpu, kernel_cache, measurements
from .tracing import under_a_mode, wants_common_operators
from .workload import Kind, Workload

BACKENDS = ("auto", "eager", "library", "triton")
ENVIRONMENT_VARIABLE = "VITLINEAR_BACKEND"
CHECK_VARIABLE = "VITLINEAR_SELF_CHECK"
CHECKS = ("once", "always", "0")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_HEAD_DIM = 128  # the largest

# Tokens of all heads and samples from which on the kernels are taken where nothing was measured.
# An estimate: below, the launches of either take longer than their work. Less in training, where
# the kernels also keep less memory.
LEAST_TOKENS = 16384
LEAST_TOKENS_IN_TRAINING = 4096

# Read once: a look-up at each call would be a guard, or a break, in compiled graphs.
_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_check_from_environment = os.environ.get(CHECK_VARIABLE) or "once"
_interpreting = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_has_triton = importlib.util.find_spec("triton") is not None


class KernelError(RuntimeError):
    """A fused kernel did not compile or did not launch."""


class VariableError(UserError, ValueError):
    """An environment variable has a value that nobody knows."""


def _unknown_value(name: str, value: str, known: Iterable[str]) -> VariableError:
    return VariableError(f"unknown {name} value {value!r}; choose from: {', '.join(known)}")


class Choice(NamedTuple):
    """A backend and the reason that it was taken."""

    backend: str
    reason: str


class _Level(NamedTuple):
    """The choice of `auto` from so many tokens on."""

    tokens: int
    choice: Choice


class _Rule(NamedTuple):
    """The choices of `auto` for a kind of call.

    Attributes:
        levels: For fewer and fewer tokens; the last for any.
        trusted: Whether the kernels passed the self-check, or need not.
    """

    levels: tuple[_Level, ...]
    trusted: bool = True

    def choice(self, tokens: int) -> Choice:
        for level in self.levels:
            if tokens >= level.tokens:
                return level.choice
        return self.levels[-1].choice


# What was decided for a kind of call, and for programs that are compiled of it.
_rules: dict[tuple[Kind, bool], _Rule] = {}
# Why kernels are not used, by kind of call: `auto` does not try them again in this process.
_failures: dict[Kind, str] = {}
# Kinds whose check passed in this process.
_passed: set[Kind] = set()
# By thread: what others call is none of an observer's business. Not `threading.local`, of which
# Dynamo does not see what was set, nor anybody whether other threads have one.
_observers: dict[int, Callable[[Workload], None]] = {}
# Counts the times that something happened after which kernels may not be chosen any more, or an
# observer came or went.
era = 0


def decide_anew() -> None:
    """Forget the choices, because something new was measured."""
    global era
    era += 1
    _rules.clear()


def _decide_again(*kinds: Kind) -> None:
    """Forget the choices for kinds of call, in programs too, of which something is known now."""
    for kind in kinds:
        for compiling in (False, True):
            _rules.pop((kind, compiling), None)


def forget() -> None:
    """Forget all that this process knows, as another would."""
    decide_anew()
    _failures.clear()
    _passed.clear()
    kernel_cache.forget()


@torch.compiler.assume_constant_result
def _thread() -> int:
    """The number of this thread."""
    return threading.get_ident()


@contextmanager
def observed(observer: Callable[[Workload], None] | None) -> Iterator[None]:
    """Tell ``observer`` of every call of this thread that a backend is chosen for."""
    global era
    thread = _thread()
    before = _observers.pop(thread, None)
    if observer is not None:
        _observers[thread] = observer
    era += 1
    try:
        yield
    finally:
        _observers.pop(thread, None)
        if before is not None:
            _observers[thread] = before
        era += 1


def is_settled(choice: Choice) -> bool:
    """Whether equal calls would get this choice again until `era` changes: it is the kernels.

    Not while any thread has an observer, which would not hear of its own calls of that kind.
    """
    return choice.backend == "triton" and not _observers


def check_backend(name: str, source: str = "backend") -> str:
    """Return the name if it is one of `BACKENDS`.

    Raises:
        ValueError: It is not; the message says where the name came from.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown {source} {name!r}; choose from: {', '.join(BACKENDS)}")
    return name


def requested_backend(requested: str = "auto") -> Choice:
    """The backend that argument and environment ask for, ``auto`` among them, and which of the two.

    Raises:
        ValueError: The name, or that in ``VITLINEAR_BACKEND``, is unknown.
    """
    if check_backend(requested) != "auto":
        return Choice(requested, "asked for by argument")
    if _from_environment not in BACKENDS:
        raise _unknown_value(ENVIRONMENT_VARIABLE, _from_environment, BACKENDS)
    if _from_environment != "auto":
        return Choice(_from_environment, f"set by {ENVIRONMENT_VARIABLE}")
    return Choice("auto", "nothing asked for")


def choose_backend(
    requested: str = "auto", work: Workload | None = None, *, may_check: bool = True
) -> Choice:
    """Decide what runs an attention.

    Args:
        requested: One of `BACKENDS`. A name other than ``auto`` wins over the environment.
        work: The tensors of the call; None to hear what was asked for, and ``eager`` if nothing
            was.
        may_check: Whether ``auto`` may run the self-check of the kernels. If not, it answers as if
            they were to pass, and says so.

    Returns:
        ``eager``, ``library`` or ``triton``, with the reason in words.

    Raises:
        ValueError: The name, or that in ``VITLINEAR_BACKEND``, is unknown; or it is ``triton`` and
            the kernels cannot run this call.
    """
    choice = requested_backend(requested)
    if _observers and work is not None and (observer := _observers.get(_thread())) is not None:
        with observed(None):  # who may ask for a choice itself
            observer(work)
    if choice.backend == "auto":
        choice = _automatic(work, may_check)
    elif choice.backend == "triton" and work is not None:
        if work.dtype == torch.float64:
            choice = Choice("eager", "the kernels have no float64")
        elif obstacle := find_obstacle(work):
            raise ValueError(f"backend 'triton' ({choice.reason}) cannot run: {obstacle}")
    if choice.backend != "eager" and torch.onnx.is_in_onnx_export():
        choice = Choice("eager", "ONNX has no vitlinear operators")
    return choice


def find_obstacle(work: Workload | Kind) -> str | None:
    """The reason why the kernels cannot run a call; None if they can."""
    if not _has_triton:
        return "triton is not installed"
    if work.device not in ("cuda", "meta") and not (_interpreting and work.device == "cpu"):
        return f"it needs a GPU, and the inputs are on {work.device!r}"
    if work.dtype not in KERNEL_DTYPES:
        return f"it has no kernels for {work.dtype}"
    if work.head_dim > KERNEL_HEAD_DIM:
        return f"it holds heads of up to {KERNEL_HEAD_DIM} channels, not {work.head_dim}"
    return None


def _automatic(work: Workload | None, may_check: bool) -> Choice:
    """The choice of ``auto``."""
    if work is None or work.device not in gpu.DEVICES:
        return Choice("eager", "auto: kernels need a GPU")
    if wants_common_operators():
        return Choice("eager", "auto: what is exported or transformed needs common operators")
    kind = work.kind
    if torch.compiler.is_compiling():
        return _rule_of_a_program(kind).choice(work.tokens)
    rule = _rules.get((kind, False)) or _make_rule(kind, compiling=False)
    choice = rule.choice(work.tokens)
    if rule.trusted or choice.backend == "eager":
        return choice
    if not may_check:
        return Choice("triton", f"{choice.reason}; to be checked at the first call")
    if gpu.is_capturing() or under_a_mode():
        return Choice("eager", "auto: kernels not checked yet, and not while calls are recorded")
    check_kernels(kind)
    return _make_rule(kind, compiling=False).choice(work.tokens)


@torch.compiler.assume_constant_result
def _rule_of_a_program(kind: Kind) -> _Rule:
    """The rule for a program that is being compiled, in which nothing can be checked."""
    rule = _rules.get((kind, True)) or _make_rule(kind, compiling=True)
    if rule.trusted:
        return rule
    untried = Choice("eager", "auto: kernels not checked yet, and not while a program is compiled")
    if all(level.choice.backend == "eager" for level in rule.levels):
        return rule
    warnings.warn(
        f"compiled programs run the formula for {kind.label}: its kernels have not been checked on "
        "this GPU yet; `vitlinear tune`, or one call before compiling, checks them",
        Notice,
        stacklevel=2,
    )
    return _Rule((_Level(0, untried),))


def _make_rule(kind: Kind, compiling: bool) -> _Rule:
    """Decide for a kind of call, and keep it, without running anything."""
    rule = _rules[kind, compiling] = _decide(kind, compiling)
    return rule


def _decide(kind: Kind, compiling: bool) -> _Rule:
    if obstacle := find_obstacle(kind):
        return _eager(obstacle)
    if failed := _failures.get(kind):
        return _eager(failed)
    if kind.device == "cuda" and not gpu.is_there():
        return _eager("there is no GPU here, its tensors are not real ones")
    device = gpu.describe(kind.device_index)
    if obstacle := gpu.obstacle(device):
        return _eager(obstacle)
    checked = check_mode()
    # A check in training includes that of inference.
    kinds = {kind, kind._replace(training=True)}
    trusted = checked == "0" or bool(kinds & _passed)
    if checked == "once" and not trusted:
        verdicts = kernel_cache.known(device).checks
        if failed := verdicts.get(kind.label):
            _warn_of_failure(kind, failed, device)
            return _eager(f"kernels failed their check here: {failed}")
        trusted = any(verdicts.get(each.label) == "" for each in kinds)
    return _Rule(_levels(kind, compiling, device), trusted)


def _eager(reason: str) -> _Rule:
    return _Rule((_Level(0, Choice("eager", f"auto: {reason}")),))


def _levels(kind: Kind, compiling: bool, device: gpu.Gpu) -> tuple[_Level, ...]:
    """From how many tokens on the kernels are taken: as measured, or by the general threshold."""
    steps = measurements.steps(kernel_cache.known(device).rows, kind, compiling, "measured here")
    if not steps:
        shipped = measurements.seeds(device.name).rows
        steps = measurements.steps(shipped, kind, compiling, f"shipped for {device.name}")
    found = [
        _Level(step.tokens, Choice("triton" if step.faster else "eager", f"auto: {step.reason}"))
        for step in reversed(steps)
    ]
    least = LEAST_TOKENS_IN_TRAINING if kind.training else LEAST_TOKENS
    use = " in training" if kind.training else ""
    if steps and not steps[0].faster:
        return (*found, _Level(0, found[-1].choice))  # with fewer tokens still less
    if steps:
        least = min(least, steps[0].tokens)
    large = Choice("triton", f"auto: not measured; from {least} tokens of all heads on{use}")
    small = Choice("eager", f"auto: not measured, and under {least} tokens of all heads{use}")
    return (*found, _Level(least, large), _Level(0, small))


def check_mode() -> str:
    """The word of the environment on the self-check: one of `CHECKS`.

    Raises:
        VariableError: Something else.
    """
    if _check_from_environment not in CHECKS:
        raise _unknown_value(CHECK_VARIABLE, _check_from_environment, CHECKS)
    return _check_from_environment


def check_kernels(kind: Kind, warn: bool = True) -> str:
    """Run the self-check for a kind of call, and keep the verdict if it ran to its end.

    Args:
        kind: The kind of call.
        warn: Whether to say so if the kernels are not used for it.

    Returns:
        Why the kernels are not used for it; empty if they passed.
    """
    from . import self_check  # with the formulas, which need no choice

    device = gpu.describe(kind.device_index)
    try:
        failed = self_check.failure(kind) or ""
    except torch.OutOfMemoryError:  # says nothing against the kernels: another process may try
        _failures[kind] = "no memory for the check of the kernels"
        if warn:
            warnings.warn(
                f"no memory to check the GPU kernels of {kind.label}, the formula runs instead",
                Notice,
                stacklevel=2,
            )
        return "no memory"
    except Exception as error:  # may have another cause, which another process may not have
        failed = describe_error(error)
    else:
        kernel_cache.add(device, lambda known: known.checks.update({kind.label: failed}))
    if failed:
        _failures[kind] = f"kernels failed their check here: {failed}"
        if warn:
            _warn_of_failure(kind, failed, device)
    else:
        _passed.add(kind)
    _decide_again(kind, kind._replace(training=False))  # which a check in training includes
    return failed


def _warn_of_failure(kind: Kind, failed: str, device: gpu.Gpu) -> None:
    warnings.warn(
        f"the GPU kernels of {kind.label} failed their check on {device.name}, the formula runs "
        f"instead: {failed}",
        Notice,
        stacklevel=2,
    )


def describe_error(error: Exception) -> str:
    """The error of a kernel in a line: the innermost cause, whose last line says most."""
    cause = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[-1]}"


def report_failure(error: Exception, required: bool, work: Workload) -> None:
    """A kernel did not compile or did not launch: say so, once for a kind of call.

    Args:
        error: What it raised.
        required: Whether nothing else may run in its place.
        work: The call. ``auto`` takes the formula for its kind from then on, and for no other.

    Raises:
        KernelError: ``required``, with the cause.
    """
    text = describe_error(error)
    if required:
        raise KernelError(f"the fused attention kernels failed: {text}") from error
    global era
    era += 1
    kinds = [work.kind._replace(training=training) for training in (False, True)]
    if all(kind in _failures for kind in kinds):
        return
    for kind in kinds:
        _failures[kind] = f"kernels failed: {text}"
    _decide_again(*kinds)
    warnings.warn(
        f"the fused attention kernels failed for {work.mechanism}, {work.dtype}, head_dim "
        f"{work.head_dim}; the formulas run instead: {text}",
        stacklevel=3,
    )
