"""The tensors of a call, as far as the choice of its backend may depend on them."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from .mechanisms import get_mechanism
from .precision import in_tf32
from .rotary import is_full_width
from .terms import Terms


class Kind(NamedTuple):
    """Calls that the same kernels serve, whatever their size: one is trusted or not as a whole.

    Attributes:
        device: Type of the device.
        device_index: Number of the device; None for the current one.
        mechanism: Key in `MECHANISMS`.
        dtype: Of q, k and v.
        head_dim: D.
        given: Which of `Terms` there are, in their order.
        training: Whether a backward pass will follow.
        value_dim: Channels of a value; 0 for D.
        full_width: Whether rotary tables turn all heads side by side.
        tf32: Whether float32 products are in TF32, which other kernels make.
    """

    device: str
    device_index: int | None
    mechanism: str
    dtype: torch.dtype
    head_dim: int
    given: tuple[bool, ...]
    training: bool
    value_dim: int = 0
    full_width: bool = False
    tf32: bool = False

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that there are."""
        return tuple(name for name, there in zip(Terms._fields, self.given, strict=False) if there)

    @property
    def label(self) -> str:
        """A name that does not depend on the device: ``rala bfloat16 64 rotary+gate training``."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.tf32:
            dtype += "-tf32"
        if self.value_dim:
            dtype += f" values-{self.value_dim}"
        terms = "+".join(self.terms) or "plain"
        if self.full_width:
            terms = terms.replace("rotary", "full-width-rotary")
        use = "training" if self.training else "inference"
        return f"{self.mechanism} {dtype} {self.head_dim} {terms} {use}"


class Workload(NamedTuple):
    """One call.

    Attributes:
        device: Type of the device.
        dtype: Of q, k and v.
        length: N.
        head_dim: D.
        mechanism: Key in `MECHANISMS`.
        batch: B.
        heads: h.
        device_index: Number of the device; None for the current one.
        given: Which of `Terms` there are, in their order; empty for none.
        training: Whether a backward pass will follow.
        value_dim: Channels of a value; 0 for D.
        full_width: Whether rotary tables turn all heads side by side.
        tf32: Whether float32 products are in TF32, which other kernels make.
    """

    device: str
    dtype: torch.dtype
    length: int
    head_dim: int
    mechanism: str
    batch: int = 1
    heads: int = 1
    device_index: int | None = None
    given: tuple[bool, ...] = ()
    training: bool = False
    value_dim: int = 0
    full_width: bool = False
    tf32: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        mechanism: str,
        terms: Terms | None = None,
        training: bool = False,
        value_dim: int = 0,
    ) -> Workload:
        """The workload of a call with these queries, [B, N, h, D], terms, and width of values."""
        batch, length, heads, dim = q.shape
        device = q.device
        given: tuple[bool, ...] = ()
        tables = None
        if terms is not None:
            given, tables = tuple([x is not None for x in terms]), terms.rotary
        if torch.compiler.is_compiling():  # a program is for one width of heads
            dim, value_dim = operator.index(dim), operator.index(value_dim)
        full_width = (
            tables is not None
            and get_mechanism(mechanism).positions == "rotary"
            and is_full_width(tables, heads, dim)
        )
        return cls(
            device.type, q.dtype, length, dim, mechanism, batch, heads,
            device.index, given, training, 0 if value_dim == dim else value_dim, full_width,
            in_tf32(q.dtype, device.type),
        )  # fmt: skip

    def on(self, device: torch.device, training: bool) -> Workload:
        """The call on another device, with or without a backward pass, as PyTorch is set there."""
        return self._replace(
            device=device.type,
            device_index=device.index,
            training=training,
            tf32=in_tf32(self.dtype, device.type),
        )

    @property
    def kind(self) -> Kind:
        """The kind of call: all of it that does not depend on the number of tokens."""
        return Kind(
            self.device, self.device_index, self.mechanism, self.dtype, self.head_dim,
            self.given, self.training, self.value_dim, self.full_width, self.tf32,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens of all heads and samples, B N h."""
        return self.batch * self.length * self.heads
