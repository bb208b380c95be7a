"""The table of attention mechanisms: each linear attention is one row of one formula.

Per head, with N tokens, queries, keys and values q, k, v, channels D, s = D^-0.5, and means taken
over the tokens::

    S = (1/N) sum_j R(w_j phi_k(k_j)) v_j^T      state, [F, D]
    m = (1/N) sum_j w_j phi_k(k_j)               normaliser state, [F]
    z_i = phi_q(q_i) . m                         vbar = (1/N) sum_j v_j
    out_i = a(z_i) R(phi_q(q_i)) tau S + b(z_i) vbar

R is the 2-D encoding of the token's position (`vitlinear.ops.rotary`) or nothing. It acts in the
numerator only: the normaliser sees features without it. tau is a scalar per head, 1 unless the
caller gives one. w_j weighs keys, not values: vbar is the plain mean.

=========  ==================  ==========  ==============  =================  ======
mechanism  phi_q, phi_k        R           w_j             a(z)               b(z)
=========  ==================  ==========  ==============  =================  ======
elu        elu + 1             rotary      1               1 / (z + eps)      0
relu       ReLU                rotary      1               1 / (z + eps)      0
rala       elu + 1             rotary      global query    1 / (z + eps)      0
mala       elu + 1             rotary      1               s + s/(s z + eps)  -s z
inline     identity            rotary      1               s                  1 - s z
nala       norm-aware, cubed   rotary      1               1 / (z + eps)      0
l2         ReLU                rotary      1               1 / max(z, 100/N)  0
lightnet   SiLU, identity      cosine      token softmax   1                  0
identity   identity            rotary      1               1                  0
pola       signed powers       none        1               1 / (z + eps)      0
=========  ==================  ==========  ==============  =================  ======

Rotary positions are the caller's choice for every row that names them.

More rows are parts of the attentions of `vitlinear.mixers`, which put norms, gates and maps of
their own around them. No layer is made of one by its name: they stand beside `MECHANISMS`, in
`MIXER_ROWS`.

=================  ====================  ===============  ==========================
mechanism          phi_q, phi_k          w_j              a(z)
=================  ====================  ===============  ==========================
features           identity              1                1 / (z + eps)
signed_features    identity              1                1 / z, at least 1e-6 from 0
elu_sum            elu + 1               1                1
elu_smoothed       elu + 1               1                1 / (z + 1e-4)
silu_sum           SiLU                  1                1
softmax_halves     softmax of x and -x   1                1 / (z + eps)
weighted_identity  identity              a number         1
weighted_elu_sum   elu + 1               a number         1
gated_identity     identity              a vector         1
gated_elu          elu + 1               a vector         1 / (z + eps)
=================  ====================  ===============  ==========================

Where phi is the identity, q or k are features already, of any width: what makes them stands
outside. Where a divides by z + eps, the products of features have to be positive. The last four
take their w_j from the caller: a number for each token and head, or one for each feature.

``pola`` reads the second half of the values by phi_q(-q_i), in a and b too. Its phi(-x) is phi(x)
with halves exchanged: the second read takes the same features, and the state and m with their
halves exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import FEATURE_MAPS, FeatureMap

Factor = Tensor | float
Count = Tensor | int


@dataclass(frozen=True)
class ReadOut:
    """The read-out of the state by queries: factors a and b of the formula, and derivatives.

    Attributes:
        factors: (z, s, N) -> (a, b); a number where the factor does not depend on z.
        derivatives: (z, s, N) -> (da/dz, db/dz), likewise.
        uses_norm: Whether z, and with it m, is needed at all.
        uses_mean: Whether b is anything but 0.
    """

    factors: Callable[[Tensor, float, Count], tuple[Factor, Factor]]
    derivatives: Callable[[Tensor, float, Count], tuple[Factor, Factor]]
    uses_norm: bool = True
    uses_mean: bool = False


# Constants stand in functions: under `torch.compile(dynamic=True)` a number of a module would be an
# input of the program, and no program when part of it is under gradient checkpointing.


def _reciprocal(z: Tensor) -> Tensor:
    """1 / (z + eps); eps is as in the released code of every family."""
    return (z + 1e-6).reciprocal()


def _normalised(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return _reciprocal(z), 0.0


def _normalised_derivatives(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return -_reciprocal(z).square(), 0.0


def _magnitude_aware(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    z = s * z
    return s + s * _reciprocal(z), -z


def _magnitude_aware_derivatives(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return -(s * _reciprocal(s * z)).square(), -s


def _injective(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return s, 1 - s * z


def _injective_derivatives(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return 0.0, -s


def _clamped_sum(z: Tensor, n: Count) -> Tensor:
    """The sum of similarities, which is what L2ViT keeps from vanishing, not their mean."""
    return (n * z).clamp(min=100.0)


def _clamped(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return n * _clamped_sum(z, n).reciprocal(), 0.0


def _clamped_derivatives(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    total = _clamped_sum(z, n)
    return -(n * total.reciprocal()).square() * (total == n * z), 0.0


def _smoothed(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return (z + 1e-4).reciprocal(), 0.0


def _smoothed_derivatives(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return -(z + 1e-4).reciprocal().square(), 0.0


def _away_from_zero(z: Tensor) -> Tensor:
    """z with a magnitude of at least 1e-6, the sign kept; 0 is positive."""
    return torch.where(z < 0, z.clamp(max=-1e-6), z.clamp(min=1e-6))


def _signed(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return _away_from_zero(z).reciprocal(), 0.0


def _signed_derivatives(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    bounded = _away_from_zero(z)
    return -bounded.reciprocal().square() * (bounded == z), 0.0


def _constant(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return 1.0, 0.0


def _constant_derivatives(z: Tensor, s: float, n: Count) -> tuple[Factor, Factor]:
    return 0.0, 0.0


READ_OUTS = {
    "normalised": ReadOut(_normalised, _normalised_derivatives),
    "magnitude-aware": ReadOut(_magnitude_aware, _magnitude_aware_derivatives, uses_mean=True),
    "injective": ReadOut(_injective, _injective_derivatives, uses_mean=True),
    "clamped": ReadOut(_clamped, _clamped_derivatives),
    "smoothed": ReadOut(_smoothed, _smoothed_derivatives),
    "signed": ReadOut(_signed, _signed_derivatives),
    "constant": ReadOut(_constant, _constant_derivatives, uses_norm=False),
}


@dataclass(frozen=True)
class Mechanism:
    """One row of the table: how a linear attention fills in the formula above.

    Attributes:
        name: Key in `MECHANISMS`; what operators and models take as a string.
        query_map: Key in `FEATURE_MAPS`, phi of queries.
        key_map: The same for keys; as wide as that of the queries.
        key_weights: ``'uniform'``: w_j = 1.
            ``'global_query'``: w_j = N softmax_j(s qbar . phi(k_j)) with qbar the mean of phi(q)
            over tokens.
            ``'token_softmax'``: each channel of phi(k) goes through a softmax over the tokens,
            times N; a weight for each token and channel.
            ``'given'``: w_j is a number that the caller gives, for each token and head.
            ``'gates'``: w_j is a vector that the caller gives, with a number for each feature.
        read_out: Key in `READ_OUTS`: a and b.
        positions: What R does with position tables: ``'rotary'`` turns neighbouring channels,
            ``'cosine'`` puts [x cos; x sin] for x; ``'none'`` takes no tables.
        learns_temperature: Whether layers learn tau, one for each head, as the mechanism's paper
            does.
        reads_opposite: Whether phi_q(-q) reads the second half of the values, and phi_q(q) the
            first alone. Asks for a feature map for which phi(-x) is phi(x) with halves exchanged.
    """

    name: str
    query_map: str
    key_map: str
    key_weights: str = "uniform"
    read_out: str = "normalised"
    positions: str = "rotary"
    learns_temperature: bool = False
    reads_opposite: bool = False

    def __post_init__(self) -> None:
        if self.reads_opposite and self.reads.uses_mean:
            raise ValueError(f"{self.name!r}: two reads of one state have no mean value")

    @property
    def phi_q(self) -> FeatureMap:
        """The feature map of queries."""
        return FEATURE_MAPS[self.query_map]

    @property
    def phi_k(self) -> FeatureMap:
        """The feature map of keys."""
        return FEATURE_MAPS[self.key_map]

    @property
    def takes_powers(self) -> bool:
        """Whether feature maps take powers from the caller."""
        return self.phi_q.takes_powers or self.phi_k.takes_powers

    @property
    def takes_key_weights(self) -> bool:
        """Whether the caller gives the weights of the keys."""
        return self.key_weights in ("given", "gates")

    def weights_per_key(self, head_dim: int) -> int:
        """Numbers that the caller gives for a key of a head of D channels; 0 if none."""
        return {"given": 1, "gates": self.feature_dim(head_dim)}.get(self.key_weights, 0)

    @property
    def read_count(self) -> int:
        """Reads of one state: two where the halves of the values have one each."""
        return 2 if self.reads_opposite else 1

    @property
    def reads(self) -> ReadOut:
        """The read-out."""
        return READ_OUTS[self.read_out]

    @property
    def has_global_query(self) -> bool:
        """Whether one query for all tokens weighs the keys."""
        return self.key_weights == "global_query"

    @property
    def has_key_softmax(self) -> bool:
        """Whether keys go through a softmax over tokens, of either kind."""
        return self.key_weights in ("global_query", "token_softmax")

    def feature_dim(self, head_dim: int) -> int:
        """F, the width of the features of a head of D channels, before R."""
        return self.phi_q.expansion * head_dim

    def state_dim(self, head_dim: int, with_positions: bool) -> int:
        """Rows of the state S: F, or 2 F where R doubles the features."""
        doubled = with_positions and self.positions == "cosine"
        return self.feature_dim(head_dim) * (2 if doubled else 1)


MECHANISMS = {
    m.name: m
    for m in (
        # Rank-augmented linear attention (Fan et al., CVPR 2025, arXiv:2411.07635).
        Mechanism("rala", "elu+1", "elu+1", key_weights="global_query"),
        # Magnitude-aware linear attention (Fan et al., ICCV 2025, arXiv:2507.00698).
        Mechanism("mala", "elu+1", "elu+1", read_out="magnitude-aware"),
        # Injective linear attention (Han et al., NeurIPS 2024, arXiv:2412.06590).
        Mechanism("inline", "identity", "identity", read_out="injective"),
        # Norm-aware linear attention (NaLaFormer, arXiv:2506.21137).
        Mechanism("nala", "norm-aware", "cubed"),
        # Linear global attention of L2ViT (arXiv:2501.16182).
        Mechanism("l2", "relu", "relu", read_out="clamped", learns_temperature=True),
        # LightNet attention, non-causal (arXiv:2405.21022).
        Mechanism(
            "lightnet",
            "silu",
            "identity",
            key_weights="token_softmax",
            read_out="constant",
            positions="cosine",
        ),
        # Plain normalised linear attention (Katharopoulos et al., ICML 2020, arXiv:2006.16236).
        Mechanism("elu", "elu+1", "elu+1"),
        Mechanism("relu", "relu", "relu"),
        # Polarity-aware linear attention (PolaFormer, ICLR 2025, arXiv:2501.15061).
        Mechanism("pola", "signed-powers", "signed-powers", positions="none", reads_opposite=True),
        # No more than the state, out_i = q_i S: the inner model of a test-time training layer.
        Mechanism("identity", "identity", "identity", read_out="constant"),
    )
}

# Parts of the attentions of `vitlinear.mixers`.
MIXER_ROWS = {
    m.name: m
    for m in (
        Mechanism("features", "identity", "identity"),
        # Taylor polynomials of odd order.
        Mechanism("signed_features", "identity", "identity", read_out="signed"),
        # NormAttention of TransNormer (arXiv:2210.10340), before its norm.
        Mechanism("elu_sum", "elu+1", "elu+1", read_out="constant"),
        # LinFusion (arXiv:2409.02097).
        Mechanism("elu_smoothed", "elu+1", "elu+1", read_out="smoothed"),
        # TransNormerLLM (arXiv:2307.14995), before its norm.
        Mechanism("silu_sum", "silu", "silu", read_out="constant"),
        # Hedgehog (arXiv:2402.04347) and LAWCAT, behind their matrices.
        Mechanism("softmax_halves", "softmax-halves", "softmax-halves"),
        # VSSD (arXiv:2407.18559), Flowformer (arXiv:2202.06258), and memories whose tokens have a
        # step each: the delta rule, Titans (arXiv:2501.00663), Miras (arXiv:2504.13173).
        Mechanism(
            "weighted_identity", "identity", "identity", key_weights="given", read_out="constant"
        ),
        # NAtS-L, before its norm.
        Mechanism("weighted_elu_sum", "elu+1", "elu+1", key_weights="given", read_out="constant"),
        # EfficientViM (arXiv:2411.15241), before what stands between state and read.
        Mechanism(
            "gated_identity", "identity", "identity", key_weights="gates", read_out="constant"
        ),
        # SAGA (arXiv:2509.12817).
        Mechanism("gated_elu", "elu+1", "elu+1", key_weights="gates"),
    )
}


def get_mechanism(name: str) -> Mechanism:
    """Look a mechanism up by name: one of `MECHANISMS`, or of `MIXER_ROWS`.

    Raises:
        ValueError: No mechanism has this name; the message lists those of `MECHANISMS`.
    """
    row = MECHANISMS.get(name) or MIXER_ROWS.get(name)
    if row is None:
        known = ", ".join(MECHANISMS)
        raise ValueError(f"unknown attention mechanism {name!r}; choose from: {known}")
    return row
