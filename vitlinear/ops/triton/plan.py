"""The plan that kernels are compiled for: one mechanism, one head size, one set of terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver

from ..mechanisms import Mechanism
from ..precision import takes_tf32
from ..terms import Terms
from .blocks import INTERPRETING

# Operands of the matrix products: those that sum over tokens, those that read the state. Rounding
# to bfloat16 averages out in a sum over tokens; that of a read would be seen. float16 has not the
# range: rotation and the cubed keys of nala leave it. Where a compiler takes no TF32, as for most
# GPUs of AMD, products are in full float32: matrix cores have those there.
PRECISIONS = {
    torch.bfloat16: ("bf16", "tf32"),
    torch.float16: ("tf32", "tf32"),
    torch.float32: ("ieee", "ieee"),
}

LONGEST_WINDOW = 64  # tokens
LARGEST_STATE = 128 * 128  # entries; two as operands in 32 bits, and a third one that is summed


@dataclass(frozen=True)
class Plan:
    """The compile-time side of every kernel.

    Attributes:
        query_map: Feature map of queries, as in `Mechanism`.
        key_map: Feature map of keys, as in `Mechanism`.
        key_weights: Weights of keys, as in `Mechanism`.
        read_out: Factors of the read-out, as in `Mechanism`.
        positions: Encoding of positions, as in `Mechanism`; ``'none'`` without position tables.
        uses_norm: Whether the read-out needs the normaliser m.
        uses_mean: Whether the read-out needs the mean value.
        expansion: Feature width over head_dim.
        head_dim: D.
        values: Dv, channels of the values and of the state.
        value_dim: Those of them that a kernel works on: all, or a slice.
        has_mask: Whether there is a padding mask.
        has_scale: Whether there is a tau.
        has_lepe: Whether the epilogue adds something.
        has_gate: Whether the epilogue multiplies by something.
        sums: Precision of products that sum over tokens.
        reads: Precision of products with a state.
        has_powers: Whether feature maps take powers.
        reads_opposite: Whether the halves of the values have a read each, as in `Mechanism`.
        full_width: Whether position tables turn all heads side by side as one vector.
        first_value: The first channel of the slice.
        adds: Whether gradients of queries and keys are added to those of slices before.
        window: Lanes for the tokens of a map that lies in one block, for programs that take one
            such map after the other; 0 for those that take one alone.
        block_tokens: Tokens that a program holds at once.
    """

    query_map: str
    key_map: str
    key_weights: str
    read_out: str
    positions: str
    uses_norm: bool
    uses_mean: bool
    expansion: int
    head_dim: int
    values: int
    value_dim: int
    has_mask: bool
    has_scale: bool
    has_lepe: bool
    has_gate: bool
    sums: str
    reads: str
    has_powers: bool = False
    reads_opposite: bool = False
    full_width: bool = False
    first_value: int = 0
    adds: bool = False
    window: int = 0
    block_tokens: int = 0  # decided by `tuning`

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Once: every launch looks up a plan, here and in Triton's cache of kernels."""
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def block_dim(self) -> int:
        """Lanes for the channels of a query or key; matrix products need 16."""
        return lanes(self.head_dim)

    @property
    def block_values(self) -> int:
        """Lanes for the channels of a value."""
        return lanes(self.value_dim)

    @property
    def block_features(self) -> int:
        """Lanes for features."""
        return self.expansion * self.block_dim

    @property
    def block_rows(self) -> int:
        """Lanes for rows of the state."""
        return self.block_features * (2 if self.positions == "cosine" else 1)

    @property
    def entries(self) -> int:
        """Lanes for the state."""
        return self.block_rows * self.block_values

    @property
    def features(self) -> int:
        """F, the width of features before R."""
        return self.expansion * self.head_dim

    @property
    def rows(self) -> int:
        """Rows of the state."""
        return self.features * (2 if self.positions == "cosine" else 1)

    @property
    def statistics(self) -> int:
        """Numbers that a softmax over keys leaves for a head."""
        return {"global_query": 1, "token_softmax": self.features}.get(self.key_weights, 0)

    @property
    def has_softmax(self) -> bool:
        """Whether keys go through a softmax over the tokens."""
        return self.statistics > 0

    @property
    def has_weights(self) -> bool:
        """Whether the caller gives weights of keys."""
        return self.key_weights in ("given", "gates")

    @property
    def fits_one_kernel(self) -> bool:
        """Whether a program has the registers for states and tokens of both passes at once."""
        return self.entries <= 128 * 64 and self.value_dim == self.values

    @property
    def programs_per_processor(self) -> int:
        """Programs that share a processor, by the registers of most kernels that they run.

        As compiled (benchmarks/accounts/kernels.md); some kernels fit more often, some less.
        """
        if self.window:
            return 16 // self.window_warps
        # Two numbers for each channel of a token, and in float32 there.
        wide_tables = self.positions == "cosine" and self.sums == "tf32"
        if self.entries > 128 * 64 or self.reads_opposite or wide_tables:
            return 1
        return 4 if self.is_small else 2

    @property
    def is_small(self) -> bool:
        """Whether the state is one of those that a program of four warps holds."""
        return self.entries <= 32 * 32

    @property
    def window_warps(self) -> int:
        """Warps of a program that takes one window after the other."""
        return 8 if self.window > 32 else 4

    def of_windows(self, length: int, backward: bool) -> Plan:
        """The plan of a kernel that does everything for maps of so many tokens.

        A program takes one map after the other, and loads ahead those that come, where the
        registers of all that it has of a map at once let others share the processor: where states
        are small and no lane is empty, and in backward for the plainest calls without sums in
        TF32, whose operands take twice the registers.
        """
        fits = length <= LONGEST_WINDOW and self.is_small and not self.reads_opposite
        fits &= (self.head_dim, self.values) == (self.block_dim, self.block_values)
        if backward:
            fits &= self.read_out in ("constant", "injective") and self.positions == "none"
            fits &= not (self.has_gate or self.has_scale) and self.sums != "tf32"
        return replace(self, window=lanes(length)) if fits else self

    @property
    def query_loops(self) -> int:
        """Loops of the backward pass over the queries.

        A small state and its gradient lie in registers at once, if there is no epilogue; others in
        one loop each. A window has no loop.
        """
        if self.window:
            return 1
        return 1 if self.is_small and not self.has_gate else 2

    @property
    def table_entries(self) -> int:
        """Cosines and sines of one position in a table of one axis."""
        return self.head_dim // (2 if self.positions == "rotary" else 1)

    @property
    def block_table(self) -> int:
        """Lanes for the cosines and sines of a token."""
        return self.block_dim * (1 if self.positions == "rotary" else 2)

    def slices(self) -> Iterator[tuple[slice, Plan]]:
        """Slices of the channels of the values, each with its own plan.

        A state larger than a program can hold is computed in slices of columns: channels of the
        values meet only in the gradients of queries and keys, which are sums over the slices.
        """
        for first in range(0, self.values, self.value_dim):
            last = min(first + self.value_dim, self.values)
            part = replace(self, value_dim=last - first, first_value=first, adds=first > 0)
            yield slice(first, last), part


def lanes(channels: int) -> int:
    """The next power of two that a matrix product takes."""
    return max(16, 1 << (channels - 1).bit_length())


@lru_cache
def precisions_of(target: GPUTarget) -> frozenset[str]:
    """Precisions of products in float32 that Triton's compiler takes for a GPU."""
    return frozenset(make_backend(target).parse_options({}).allowed_dot_input_precisions)


def _for_target(precision: str) -> str:
    """A precision of `PRECISIONS`, or the next better one for the GPU in use."""
    if precision == "tf32" and precision not in precisions_of(driver.active.get_current_target()):
        return "ieee"
    return precision


def make_plan(
    mechanism: Mechanism,
    dtype: torch.dtype,
    head_dim: int,
    terms: Terms,
    values: int | None = None,
) -> Plan:
    """The plan for a call, without what `tuning` decides; ``values`` is Dv, D if it is None."""
    values = head_dim if values is None else values
    sums, reads = PRECISIONS[dtype]
    if INTERPRETING:  # which multiplies in float32 whatever it is told, bfloat16 wrongly
        sums = reads = "ieee"
    elif dtype == torch.float32 and takes_tf32():
        sums = reads = "tf32"
    sums, reads = _for_target(sums), _for_target(reads)
    tables = terms.rotary
    rows = mechanism.state_dim(lanes(head_dim), tables is not None)
    slices = -(-rows * lanes(values) // LARGEST_STATE)
    return Plan(
        query_map=mechanism.query_map,
        key_map=mechanism.key_map,
        key_weights=mechanism.key_weights,
        read_out=mechanism.read_out,
        positions="none" if tables is None else mechanism.positions,
        uses_norm=mechanism.reads.uses_norm,
        uses_mean=mechanism.reads.uses_mean,
        expansion=mechanism.phi_q.expansion,
        head_dim=head_dim,
        values=values,
        value_dim=-(-values // slices),
        has_mask=terms.key_padding_mask is not None,
        has_scale=terms.head_scale is not None,
        has_lepe=terms.lepe is not None,
        has_gate=terms.gate is not None,
        sums=sums,
        reads=reads,
        has_powers=mechanism.takes_powers,
        reads_opposite=mechanism.reads_opposite,
        full_width=tables is not None
        and mechanism.positions == "rotary"
        and 4 * tables.rows.shape[1] != head_dim,
    )
