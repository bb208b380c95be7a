"""The table of attention mechanisms: each linear attention is one row of one formula.

Per head, with N tokens, queries, keys and values q, k, v and means taken over the tokens::

    S = (1/N) sum_j w_j R(phi(k_j)) v_j^T        state, [F, D]
    m = (1/N) sum_j w_j phi(k_j)                 normaliser state, [F]
    z_i = phi(q_i) . m
    out_i = a(z_i) R(phi(q_i)) S

R is the 2-D rotary encoding of the token (`vitlinear.ops.rotary`) or nothing. It acts in the
numerator only: the normaliser sees features without it, so z_i stays positive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1``: ``exp(x)`` for x <= 0, ``x + 1`` above (Katharopoulos et al., 2020)."""
    return F.elu(x) + 1


def elu_plus_one_derivative(x: Tensor) -> Tensor:
    """Derivative of `elu_plus_one`."""
    return torch.exp(x.clamp(max=0))


def relu_derivative(x: Tensor) -> Tensor:
    """Derivative of ReLU, 0 at 0 as in PyTorch."""
    return (x > 0).to(x.dtype)


@dataclass(frozen=True)
class FeatureMap:
    """An elementwise map phi and its derivative, both taken at the map's input.

    Both return new tensors, never their argument: the closed-form backward works on them in place.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


FEATURE_MAPS = {
    "elu+1": FeatureMap(elu_plus_one, elu_plus_one_derivative),
    "relu": FeatureMap(torch.relu, relu_derivative),
}


@dataclass(frozen=True)
class Mechanism:
    """One row of the table: how a linear attention fills in the formula above.

    Attributes:
        name: Key in `MECHANISMS`; what operators and models take as a string.
        feature_map: Key in `FEATURE_MAPS`; phi of queries and keys.
        key_weights: ``'uniform'``: w_j = 1.
            ``'global_query'``: w_j = N softmax_j(s qbar . phi(k_j)) with qbar the mean of phi(q)
            over tokens and s = D^-0.5.
        eps: Added to the normaliser: a(z) = 1 / (z + eps).
    """

    name: str
    feature_map: str
    key_weights: str = "uniform"
    eps: float = 1e-6

    @property
    def phi(self) -> FeatureMap:
        """The feature map itself."""
        return FEATURE_MAPS[self.feature_map]

    @property
    def weighs_keys(self) -> bool:
        """Whether keys carry weights that depend on the other tokens."""
        return self.key_weights == "global_query"


MECHANISMS = {
    m.name: m
    for m in (
        # Rank-augmented linear attention (Fan et al., CVPR 2025, arXiv:2411.07635).
        Mechanism("rala", feature_map="elu+1", key_weights="global_query"),
        # Plain normalised linear attention (Katharopoulos et al., ICML 2020, arXiv:2006.16236).
        Mechanism("elu", feature_map="elu+1"),
        Mechanism("relu", feature_map="relu"),
    )
}


def get_mechanism(name: str) -> Mechanism:
    """Look a mechanism up by name.

    Raises:
        ValueError: No mechanism has this name; the message lists those that exist.
    """
    try:
        return MECHANISMS[name]
    except KeyError:
        known = ", ".join(MECHANISMS)
        raise ValueError(f"unknown attention mechanism {name!r}; choose from: {known}") from None
