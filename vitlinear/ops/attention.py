"""The public attention functions: check the inputs, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, eager
from . import backend as decisions
from . import registered as registered  # registers torch.ops.vitlinear.*
from .backend import choose_backend, requested_backend
from .mechanisms import Mechanism, get_mechanism
from .precision import in_tf32
from .rotary import TABLE_DTYPES, RotaryTables
from .terms import Terms
from .tracing import PLAIN, is_looked_at, is_watched
from .workload import Workload


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mechanism: str = "elu",
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    head_scale: Tensor | None = None,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
    powers: Tensor | None = None,
    key_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention whose cost grows linearly with the number of tokens.

    Per head, with feature maps phi, key weights w and factors a, b given by the mechanism
    (`vitlinear.ops.mechanisms` has the table), positions R, and sums over the N tokens::

        out_i = a(z_i) R(phi_q(q_i))^T tau S + b(z_i) vbar        z_i = phi_q(q_i) . m
        S = 1/N sum_j R(w_j phi_k(k_j)) v_j^T    m = 1/N sum_j w_j phi_k(k_j)

    and, where they are given, (out_i + lepe_i) * gate_i, elementwise, rounded once.

    Args:
        q: Queries, [B, N, h, D], float16, bfloat16, float32 or float64, any strides: views of
            one projection need no copy.
        k: Keys, like q.
        v: Values, [B, N, h, Dv]: like q, but for the number of channels.
        mechanism: Key in `MECHANISMS`.
        rotary: Tables of an H x W grid with H * W = N: from `rotary_tables`, for every head alike;
            from `full_width_rotary_tables`, for all heads side by side; for ``lightnet`` from
            `lrpe_tables`.
        key_padding_mask: [B, N] bool, **True for padding**, as in `torch.nn.MultiheadAttention`.
            Padded tokens count nowhere, means divide by the number of the others, and their own
            output is 0. What they hold does not matter, NaN included. Or [B] integers from 0 to N:
            the number of valid tokens, which then stand first. Only plain calls on CPUs look at the
            values: elsewhere a number below 0 counts as 0, one above N as N.
        head_scale: tau, a factor of the state for each head, [h]; None for 1.
        lepe: Added to the output, like v; the name is that of the locally-enhanced position
            encoding, a depthwise convolution of the values.
        gate: Multiplies the sum of output and lepe, like v.
        powers: Powers of a feature map that learns them (``pola``), above 0, for each channel of
            each head, [h, D], floating-point of any type.
        key_weights: w_j of a mechanism that is given them, [B, N, h, 1], or for each feature (gates
            of the keys), [B, N, h, F], floating-point of any type. They are factors as they are: no
            softmax, no division by their sum.
        backend: ``auto``, ``eager``, ``library`` or ``triton``; see `vitlinear.ops.backend`.

    Returns:
        [B, N, h, Dv] in the type of q. Sums are kept in float32 (float64 for float64 inputs).

        Finite, as are the gradients, for values up to 1e3 with queries and keys up to 1e4; where
        rotation does not meet a normaliser of zero, up to 1e12 (1e10 for ``nala``, which cubes its
        keys). What float16 cannot hold saturates, and so do features of ``pola`` above 3e14 in
        float32.

        Finite is not small: ``relu`` with rotary tables and few tokens can meet queries that have
        no key in common, whose normaliser is 0 while the rotated sum is not (seen with 4 tokens:
        outputs of 1e6, `benchmarks/accounts/fashion-mnist.md`).

    Raises:
        ValueError: Shapes or types do not fit, a name is unknown, or the backend is ``triton`` and
            cannot run here.
        NotImplementedError: A derivative that the registered operators do not have.
        KernelError: The backend is ``triton`` and a kernel failed.
    """
    mask = None if key_padding_mask is None else mask_of_lengths(key_padding_mask, q)
    terms = Terms(rotary, mask, head_scale, lepe, gate, powers, key_weights)
    call = None
    if not torch.compiler.is_compiling() and not is_looked_at():
        call = known(q, k, v, mechanism, terms)
    if call is None:  # not a plain one
        call = examined(q, k, v, mechanism, terms)
        if (chosen := _chosen(backend, call)) == "eager":
            return eager.linear_attention(q, k, v, call.row, terms)
        check_derivatives(terms, q, k, v)
        return torch.ops.vitlinear.linear_attention(q, k, v, mechanism, *terms.flatten(), chosen)[0]
    if (chosen := chosen_for(backend, call)) == "eager":
        return eager.linear_attention(q, k, v, call.row, terms)
    if rotary is not None and (rotary.rows.requires_grad or rotary.cols.requires_grad):
        check_tables_gradient(terms)
    return autograd.linear_attention(
        q, k, v, call.row, terms, chosen, call.work.training, call.memo
    )


def chosen_for(requested: str, call: Examined) -> str:
    """``eager``, or the backend that the operators are to be given; as settled, if it is."""
    settled = call.settled
    if settled is not None and settled[0] == decisions.era and settled[1] == requested:
        return settled[2]
    return _chosen(requested, call)


def _chosen(requested: str, call: Examined) -> str:
    """``eager``, or the backend that the operators are to be given.

    Raises:
        ValueError: The backend is unknown, or is ``triton`` and cannot run the call.
    """
    choice = choose_backend(requested, call.work)
    chosen = choice.backend
    if chosen != "eager" and chosen != requested:
        # Unless kernels were asked for by name, the formulas may stand in.
        chosen = requested_backend(requested).backend
    if decisions.is_settled(choice):
        call.settled = decisions.era, requested, chosen
    return chosen


class Examined:
    """A call whose shapes and types fit.

    Attributes:
        row: The mechanism.
        work: What the choice of the backend may depend on.
        settled: Where it is the kernels: `backend.era` at that time, the backend that was asked
            for, and the one that the operators are given.
        memo: Of what the kernels prepare for such calls.
    """

    __slots__ = ("memo", "row", "settled", "work")

    def __init__(self, row: Mechanism, work: Workload) -> None:
        self.row, self.work = row, work
        self.settled: tuple[int, str, str] | None = None
        self.memo: dict[str, Any] = {}


def examined(q: Tensor, k: Tensor, v: Tensor, mechanism: str, terms: Terms) -> Examined:
    """Look at a call.

    Raises:
        ValueError: Something does not fit; the message names it.
    """
    row = get_mechanism(mechanism)
    check_tokens(q, k, v)
    check_mechanism(q, row, terms.powers, v.shape[-1])
    check_key_weights(k, row, terms.key_weights)
    check_terms(q, terms, row.positions, v.shape[-1])
    training = is_training(terms, q, k, v)
    return Examined(row, Workload.of(q, mechanism, terms, training, v.shape[-1]))


def is_training(terms: Terms, *others: Tensor | None) -> bool:
    """Whether a backward pass will follow: one of a call's tensors wants a gradient.

    Args:
        terms: Of the call; kernels have no gradient of position tables.
        *others: What it is given besides.
    """
    return torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*others, *terms[2:])
    )


_known: dict[tuple[Any, ...], Examined] = {}
MOST_KNOWN = 4096


def known(q: Tensor, k: Tensor, v: Tensor, mechanism: str, terms: Terms) -> Examined | None:
    """As `examined`, which looks but once at calls that are alike; None of what is not plain."""
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN:
        return None
    if q.is_neg() or k.is_neg() or v.is_neg():  # signs that are not in memory
        return None
    given = facts_of_terms(terms)
    if given is None:
        return None
    with_gradients = torch.is_grad_enabled()
    training = with_gradients and (q.requires_grad or k.requires_grad or v.requires_grad)
    device = q.device
    key = (
        mechanism, device, with_gradients, training, q.dtype, q.shape, k.dtype, k.shape, v.dtype,
        v.shape, k.get_device(), v.get_device(), given,
        # Of which kernels depend.
        in_tf32(q.dtype, device.type),
    )  # fmt: skip
    call = _known.get(key)
    if call is None:
        if q.is_meta:
            return None
        if len(_known) >= MOST_KNOWN:  # sizes that never come again
            _known.clear()
        call = _known[key] = examined(q, k, v, mechanism, terms)
    return call


def facts_of_terms(terms: Terms) -> tuple[Any, ...] | None:
    """All of the terms that a check of a call may depend on; None if one of them is not plain.

    Without a loop, which would take longer than all the rest.
    """
    rotary, mask, head_scale, lepe, gate, powers, weights = terms
    plain = PLAIN
    tables = None
    if rotary is not None:
        tables = facts_of_tables(*rotary)
        if tables is None:
            return None
    if mask is not None and type(mask) not in plain:
        return None
    if head_scale is not None and (type(head_scale) not in plain or head_scale.is_neg()):
        return None
    if lepe is not None and (type(lepe) not in plain or lepe.is_neg()):
        return None
    if gate is not None and (type(gate) not in plain or gate.is_neg()):
        return None
    if powers is not None and (type(powers) not in plain or powers.is_neg()):
        return None
    if weights is not None and (type(weights) not in plain or weights.is_neg()):
        return None
    return (
        tables,
        None if mask is None else (mask.dtype, mask.shape, mask.get_device()),
        None if head_scale is None else facts_of_term(head_scale),
        None if lepe is None else facts_of_term(lepe),
        None if gate is None else facts_of_term(gate),
        None if powers is None else facts_of_term(powers),
        None if weights is None else facts_of_term(weights),
    )


def facts_of_term(x: Tensor) -> tuple[Any, ...]:
    """All of one term that a check of a call may depend on."""
    return x.dtype, x.shape, x.get_device(), x.requires_grad


# The position tables that were looked at last, and what was seen: the attentions of a stage are all
# given the same.
_tables: tuple[Tensor | None, Tensor | None, tuple[Any, ...] | None] = None, None, None


def facts_of_tables(rows: Tensor, cols: Tensor) -> tuple[Any, ...] | None:
    """All of position tables that a check of a call may depend on; None if they are not plain."""
    global _tables
    last = _tables
    if rows is last[0] and cols is last[1]:
        return last[2]
    if type(rows) not in PLAIN or type(cols) not in PLAIN:
        return None
    facts = (
        rows.dtype, cols.dtype, rows.shape, cols.shape, rows.get_device(), cols.get_device(),
    )  # fmt: skip
    _tables = rows, cols, facts
    return facts


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention, softmax(R(q) R(k)^T / sqrt(D)) v, for the late stages of pyramids.

    Args, returns and errors as for `linear_attention`. All backends but ``library`` run on
    `torch.nn.functional.scaled_dot_product_attention`.
    """
    terms = Terms(rotary, mask_of_lengths(key_padding_mask, q))
    check_tokens(q, k, v)
    if v.shape != q.shape:
        raise ValueError(
            f"softmax attention takes values of the width of q, {tuple(q.shape)}, "
            f"got {tuple(v.shape)}"
        )
    check_terms(q, terms)
    if choose_backend(backend).backend != "library":
        return eager.softmax_attention(q, k, v, terms)
    check_derivatives(terms, q, k, v)
    rows, cols, mask, *_ = terms.flatten()
    return torch.ops.vitlinear.softmax_attention(q, k, v, rows, cols, mask)[0]


def mask_of_lengths(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The padding mask, [B, N] bool, of a mask or of valid lengths, [B] integers.

    Raises:
        ValueError: A length is below 0 or above N, in a plain call on a CPU.
    """
    if mask is None or mask.dim() != 1 or mask.dtype not in (torch.int32, torch.int64):
        return mask
    number = q.shape[1]
    # A wrong number of lengths is left to the check of the mask's shape.
    fits = mask.shape[0] == q.shape[0]
    if fits and mask.device.type == "cpu" and type(mask) in PLAIN and not is_watched():
        for image, length in enumerate(mask.tolist()):
            if not 0 <= length <= number:
                raise ValueError(
                    f"lengths in key_padding_mask must be from 0 to {number}, the tokens, "
                    f"got {length} for image {image}"
                )
    return torch.arange(number, device=mask.device) >= mask.unsqueeze(1)


def check_derivatives(terms: Terms, *others: Tensor | None) -> None:
    """Check that the registered operators can give the derivatives that are asked for.

    Args:
        terms: Those of the call.
        others: The other tensors that it has a derivative by.

    Raises:
        NotImplementedError: They cannot, and would leave them out without a word.
    """
    tokens = (*others, *terms[2:])
    if not torch.compiler.is_compiling() and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tokens
    ):
        raise NotImplementedError(
            "the library backend has no forward-mode derivative; use backend='eager'"
        )
    check_tables_gradient(terms)


def check_tables_gradient(terms: Terms) -> None:
    """Check that no gradient of position tables is asked for.

    Raises:
        NotImplementedError: One is.
    """
    tables = terms.rotary
    if tables is None or not (tables.rows.requires_grad or tables.cols.requires_grad):
        return
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "the library backend has no gradient of rotary tables; use backend='eager'"
        )


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check shapes and types of queries, keys and values.

    Raises:
        ValueError: Something does not fit; the message names it.
    """
    if q.dim() != 4:
        raise ValueError(f"q, k and v must be [B, N, h, D], got q of shape {tuple(q.shape)}")
    if q.shape[1] == 0:
        raise ValueError(f"attention needs at least one token, got q of shape {tuple(q.shape)}")
    if k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must have one shape but for the channels of v, got {shapes}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must have one floating-point type, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    check_device(q.device, {"k": k, "v": v})


def check_device(device: torch.device, tensors: Mapping[str, Tensor | None]) -> None:
    """Check that tensors, by their names, are where the queries are.

    Kernels would read those of another GPU while they are still written.

    Raises:
        ValueError: One is not; the message names it.
    """
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(
                f"{name} must be on the device of q, {device}, and is on {x.device}: move it there"
            )


def check_mechanism(q: Tensor, mechanism: Mechanism, powers: Tensor | None, value_dim: int) -> None:
    """Check what a mechanism asks of a call.

    Args:
        q: Queries or keys, [B, N, h, D], already checked.
        mechanism: The row of the table.
        powers: As in `linear_attention`.
        value_dim: Channels of the values, Dv.

    Raises:
        ValueError: Something does not fit; the message names it.
    """
    name, shape = mechanism.name, q.shape[2:]
    if mechanism.takes_powers != (powers is not None):
        wants = f"needs powers, [h, D] = {tuple(shape)}" if powers is None else "takes no powers"
        raise ValueError(f"mechanism {name!r} {wants}")
    if powers is not None and (powers.shape != shape or not powers.is_floating_point()):
        raise ValueError(
            f"powers must be floating-point and [h, D] = {tuple(shape)}, "
            f"got {tuple(powers.shape)} {powers.dtype}"
        )
    if mechanism.reads_opposite and value_dim % 2:
        raise ValueError(
            f"mechanism {name!r} reads the two halves of the values differently and needs an even "
            f"number of channels, got {value_dim}"
        )


def check_key_weights(k: Tensor, mechanism: Mechanism, weights: Tensor | None) -> None:
    """Check that weights of keys [B, N, h, D] are given where, and as, a mechanism takes them.

    Raises:
        ValueError: They are not; the message says why.
    """
    numbers = mechanism.weights_per_key(k.shape[3])
    if not numbers and weights is None:
        return
    name, shape = mechanism.name, (*k.shape[:3], numbers)
    if weights is None:
        raise ValueError(f"mechanism {name!r} needs key_weights, [B, N, h, {numbers}] = {shape}")
    if not numbers:
        raise ValueError(f"mechanism {name!r} takes no key_weights")
    if weights.shape != shape or not weights.is_floating_point():
        raise ValueError(
            f"key_weights must be floating-point and [B, N, h, {numbers}] = {shape}, "
            f"got {tuple(weights.shape)} {weights.dtype}"
        )


def check_terms(
    q: Tensor, terms: Terms, positions: str = "rotary", value_dim: int | None = None
) -> None:
    """Check shapes and types of the optional terms.

    Args:
        q: Queries, [B, N, h, D], already checked.
        terms: What stands beside q, k and v.
        positions: Kind of the position tables, as in `vitlinear.ops.Mechanism`.
        value_dim: Channels of the output, Dv; those of q if it is None.

    Raises:
        ValueError: Something does not fit; the message names it.
    """
    check_device(q.device, terms.flatten()._asdict())
    if terms.rotary is not None:
        check_tables(q, terms.rotary, positions)
    mask = terms.key_padding_mask
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"key_padding_mask must be bool, got {mask.dtype}")
        if mask.shape != q.shape[:2]:
            raise ValueError(
                f"key_padding_mask must be [B, N] = {tuple(q.shape[:2])}, got {tuple(mask.shape)}"
            )
    head_scale = terms.head_scale
    if head_scale is not None and head_scale.shape != q.shape[2:3]:
        raise ValueError(
            f"head_scale must have one entry for each of {q.shape[2]} heads, "
            f"got shape {tuple(head_scale.shape)}"
        )
    shape = (*q.shape[:3], q.shape[3] if value_dim is None else value_dim)
    for name, x in (("lepe", terms.lepe), ("gate", terms.gate)):
        if x is not None and (x.shape != shape or x.dtype != q.dtype):
            raise ValueError(
                f"{name} must have the shape and type of the output, {shape} {q.dtype}, "
                f"got {tuple(x.shape)} {x.dtype}"
            )


def check_tables(q: Tensor, rotary: RotaryTables, positions: str) -> None:
    """Check that position tables fit queries [B, N, h, D]; arguments as `check_terms`.

    Raises:
        ValueError: They do not; the message says why.
    """
    if positions == "none":
        raise ValueError("this mechanism has no positions: rotary must be None")
    if not isinstance(rotary, RotaryTables):
        raise ValueError(
            "rotary must be RotaryTables, as rotary_tables and its likes make them, got "
            f"{type(rotary).__name__}"
        )
    rows, cols = rotary
    if rows.dtype != cols.dtype or rows.dtype not in TABLE_DTYPES:
        raise ValueError(
            f"rotary tables must both be float32, float64 or float16, got {rows.dtype}, "
            f"{cols.dtype}"
        )
    if rows.shape[0] * cols.shape[0] != q.shape[1]:
        raise ValueError(
            f"rotary tables of a {rows.shape[0]} x {cols.shape[0]} grid do not fit "
            f"{q.shape[1]} tokens"
        )
    heads, dim = q.shape[2:]
    widths, per_angle, maker = [dim], 2, "lrpe_tables"
    if positions == "rotary":
        # A pair of channels must not lie in two heads.
        widths, per_angle = [dim, heads * dim] if dim % 2 == 0 else [], 4
        maker = "rotary_tables, or for all heads side by side with full_width_rotary_tables"
    fitting = [(width // per_angle, 2) for width in widths if width % per_angle == 0]
    if rows.shape[1:] not in fitting or cols.shape[1:] != rows.shape[1:]:
        raise ValueError(
            f"rotary tables of shapes {tuple(rows.shape)}, {tuple(cols.shape)} do not fit "
            f"{heads} heads of {dim} channels; make them with {maker}"
        )
