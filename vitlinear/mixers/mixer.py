"""Base of every attention of the registry: a mixer of values between projections of a layer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vitlinear.layers.band import of_method
from vitlinear.layers.heads import split_heads
from vitlinear.ops import accumulation_dtype
from vitlinear.ops.backend import check_backend
from vitlinear.ops.eager import saturate, widen, without_autocast

from .description import AttentionDescription, Order
from .grid import Grid


class Mixer(nn.Module):
    """Attention between the projections: queries, keys and values in, mixed values out.

    A subclass is registered with its description, and has `mix` and `definition`. What it learns
    it makes in its constructor, which takes the options of the description by name.

    Attributes:
        description: Class attribute, by `vitlinear.mixers.register`.
        positions: Class attribute: the kind of position tables where `description.turns` is
            ``inside``: ``rotary``, ``cosine``, or ``full width``.
        attn_type: The name, for reports.
        order: One of `description.ORDERS`, as the options have it that `make_mixer` was given.
        resets_parts: Class attribute: whether `reset_parameters` gives linear layers and
            convolutions inside other values than those that a model gives all of them.
        moves_in_training: Class attribute: names of buffers that a forward pass in training
            changes. Recomputing has to take them as they were, an update that is skipped puts them
            back, and processes that train together exchange them.
        recomputed_as_it_was: Whether a recomputation that runs now has these buffers as they were;
            who checkpoints sets it.
    """

    description: ClassVar[AttentionDescription]
    positions: ClassVar[str] = "rotary"
    row_rule: ClassVar[str] = of_method("mix")
    resets_parts: ClassVar[bool] = False
    moves_in_training: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check and keep what all take.

        Args:
            dim: Channels of all heads, C.
            num_heads: Heads, h, each of D = C / h channels.
            backend: One of `vitlinear.ops.BACKENDS`, for what runs in the operator.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads, or backend is unknown.
        """
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = split_heads(dim, num_heads)
        self.backend = check_backend(backend)
        self.attn_type = self.description.name
        self.order: Order = self.description.order
        self.recomputed_as_it_was = False

    @classmethod
    def kind_of_tables(cls) -> str:
        """Kind of the position tables that are made for it: `positions`, if it turns by them."""
        return cls.positions if cls.description.turns == "inside" else "rotary"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Mix values.

        States and sums are float32 (float64 for float64), autocast or not; what float16 cannot
        hold saturates. Subclasses that leave all of it to the operator override this.

        Args:
            q: Queries, [B, N, h, D], any strides.
            k: Keys, likewise.
            v: Values, likewise.
            grid: Where the tokens stand.
            x: Input of the layer, [B, N, C], for mixers that read it.

        Returns:
            [B, N, h, D] in the type of v; 0 for padding.

        Raises:
            ValueError: The tokens are not those of the grid, or too many.
        """
        grid.check(q)
        self.description.check_length(q.shape[1])
        extra = None if x is None else self.from_input(x, grid)
        dtype = accumulation_dtype(q.dtype)
        with without_autocast(q):
            q, k, values = (grid.hide(widen(t, dtype)) for t in (q, k, v))
            out = self.mix(q, k, values, grid, extra)
            return grid.hide(saturate(out, v.dtype).to(v.dtype))

    def check_recomputation(self) -> None:
        """Check, before a buffer moves, that this is no recomputation with the moved one.

        Raises:
            RuntimeError: It is: the gradients would be of another forward pass.
        """
        if torch.compiler.is_compiling() or self.recomputed_as_it_was:
            return
        if torch._C._current_graph_task_id() != -1:  # inside of a backward pass
            raise RuntimeError(
                f"{self.description.name} moves its {' and '.join(self.moves_in_training)} in "
                "training, and gradient checkpointing would recompute with the moved ones: switch "
                "it off (set_grad_checkpointing(False)); vitlinear's own models keep those of the "
                "forward pass"
            )

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """The part of the input of the layer, [B, N, C], that `mix` gets, such as gates; or None.

        Runs under autocast where there is some, as projections do.
        """
        return None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula at its cost.

        Args:
            q: Queries, [B, N, h, D], float32 or float64, 0 for padding.
            k: Keys, likewise.
            v: Values, likewise.
            grid: Where the tokens stand, and which are padding.
            extra: What `from_input` made.

        Returns:
            [B, N, h, D]; what stands in padding does not matter.
        """
        raise NotImplementedError

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The definition, written to be read: any cost, any dtype, the oracle of the tests.

        Arguments and result as `forward`; it is never asked about padding.
        """
        raise NotImplementedError
