"""The sums over tokens that a linear attention leaves for its backward pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearAttentionState(NamedTuple):
    """All that backward needs besides the inputs; shapes and names as in `vitlinear.ops.eager`.

    Attributes:
        state: S without tau, [B, h, F, Dv]; 2 F rows where R doubles the features.
        norm: m, [B, h, 1, F]; None unless the mechanism has a normaliser.
        mean_v: vbar, [B, h, 1, Dv]; None unless the mechanism reads it.
        query: The mean query qbar, [B, h, 1, F]; None unless one query weighs the keys.
        logsumexp: Of the softmax over keys: of s qbar . phi(k_j), [B, h, 1, 1], or of each channel,
            [B, h, 1, F]; None without a softmax.
    """

    state: Tensor
    norm: Tensor | None = None
    mean_v: Tensor | None = None
    query: Tensor | None = None
    logsumexp: Tensor | None = None

    def flatten(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Five contiguous tensors, as registered operators return them: [0] for None."""
        state, norm, mean_v, query, logsumexp = (
            self.state.new_empty(0) if x is None else x.contiguous() for x in self
        )
        return state, norm, mean_v, query, logsumexp

    @classmethod
    def unflatten(cls, state: Tensor, *others: Tensor) -> LinearAttentionState:
        """The state that `flatten` made these of."""
        return cls(state, *(x if x.dim() == state.dim() else None for x in others))


class StateGradients(NamedTuple):
    """Gradients of what a state is made of.

    Attributes:
        k: [B, N, h, D].
        v: [B, N, h, Dv].
        powers: [h, D]; None without powers.
        key_weights: [B, N, h, 1 or F]; None where the mechanism takes none.
    """

    k: Tensor
    v: Tensor
    powers: Tensor | None
    key_weights: Tensor | None


class GivenGradients(NamedTuple):
    """Gradients of what a read is given; None for what is not there.

    Attributes:
        q: [B, N, h, D].
        state: One for each sample, as are the next two.
        norm: Of m.
        mean_v: Of vbar.
        head_scale: [h].
        lepe: Like the output; None without a gate: it then is the gradient of the output.
        gate: Like the output.
        powers: [h, D].
    """

    q: Tensor
    state: Tensor
    norm: Tensor | None
    mean_v: Tensor | None
    head_scale: Tensor | None
    lepe: Tensor | None
    gate: Tensor | None
    powers: Tensor | None
