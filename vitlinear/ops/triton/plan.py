"""What the kernels are compiled for: one mechanism, one head size, one set of options."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..mechanisms import Mechanism
from .blocks import INTERPRETING

# Operands of the matrix products: those that sum over tokens, those that read the state. Rounding
# to bfloat16 averages out in a sum over tokens; that of a read would be seen. float16 has not the
# range: rotation and the cubed keys of nala leave it.
PRECISIONS = {
    torch.bfloat16: ("bf16", "tf32"),
    torch.float16: ("tf32", "tf32"),
    torch.float32: ("ieee", "ieee"),
}


@dataclass(frozen=True)
class Plan:
    """The compile-time side of every kernel.

    Attributes:
        query_map: From `Mechanism`, as the next six.
        key_map: .
        key_weights: .
        read_out: .
        positions: ``'none'`` without position tables.
        uses_norm: .
        uses_mean: .
        expansion: Feature width over head_dim.
        head_dim: D.
        has_mask: Whether there is a padding mask.
        has_scale: Whether there is a tau.
        sums: Precision of products that sum over tokens.
        reads: Precision of products with a state.
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
    has_mask: bool
    has_scale: bool
    sums: str
    reads: str
    block_tokens: int = 0  # decided by `tuning`

    @property
    def block_dim(self) -> int:
        """Lanes for the channels of a head; matrix products need 16."""
        return max(16, 1 << (self.head_dim - 1).bit_length())

    @property
    def block_features(self) -> int:
        """Lanes for features."""
        return self.expansion * self.block_dim

    @property
    def block_rows(self) -> int:
        """Lanes for rows of the state."""
        return self.block_features * (2 if self.positions == "cosine" else 1)

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
        return {"uniform": 0, "global_query": 1, "token_softmax": self.features}[self.key_weights]

    @property
    def fits_one_kernel(self) -> bool:
        """Whether a program has the registers for states and tokens of both passes at once."""
        return self.block_rows * self.block_dim <= 128 * 64

    @property
    def table_entries(self) -> int:
        """Cosines and sines of one position in a table of one axis."""
        return self.head_dim // (2 if self.positions == "rotary" else 1)

    @property
    def block_table(self) -> int:
        """Lanes for the cosines and sines of a token."""
        return self.block_dim * (1 if self.positions == "rotary" else 2)


def make_plan(
    row: Mechanism, dtype: torch.dtype, head_dim: int, rotary: bool, mask: bool, scale: bool
) -> Plan:
    """The plan for a call, without what `tuning` decides."""
    sums, reads = PRECISIONS[dtype]
    if INTERPRETING:  # which multiplies in float32 whatever it is told, bfloat16 wrongly
        sums = reads = "ieee"
    elif dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        sums = reads = "tf32"
    plan = Plan(
        query_map=row.query_map,
        key_map=row.key_map,
        key_weights=row.key_weights,
        read_out=row.read_out,
        positions=row.positions if rotary else "none",
        uses_norm=row.reads.uses_norm,
        uses_mean=row.reads.uses_mean,
        expansion=row.phi_q.expansion,
        head_dim=head_dim,
        has_mask=mask,
        has_scale=scale,
        sums=sums,
        reads=reads,
    )
    if dtype == torch.bfloat16 and plan.block_rows * plan.block_dim > 128 * 128:
        # Two such states as operands in more than 16 bits are more than a processor holds.
        return replace(plan, reads=sums)
    return plan
