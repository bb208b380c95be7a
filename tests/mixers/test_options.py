"""Options of the attentions: each value against the definition, and what they are to bring."""

from __future__ import annotations

import pytest
import torch

from tests.mixers.test_contract import HEADS, close, mixer_of, normal, tokens
from vitlinear.mixers import Grid

# Of each option, the values that are not its default.
CASES = [
    ("flowformer", {"clamp": False}),
    ("norm_attention", {"map": "elu"}),
    ("diag_attention", {"window": 2}),
    ("diag_attention", {"window": 3, "scores": "relu"}),
    ("transnormer", {"gate": False, "silu_values": True}),
    ("transnormer", {"decay": "two_sided"}),
    ("based", {"feature_dim": 3, "expansion": "full"}),
    ("based", {"feature_dim": 4}),
    ("taylor", {"degree": 0}),
    ("taylor", {"degree": 1, "norm": "rms"}),
    ("taylor", {"degree": 3, "feature_dim": 3}),
    ("taylor", {"degree": 2, "norm": "sum"}),
    ("hedgehog", {"map": "exp", "bias": True}),
    ("hedgehog", {"map": "exp_max"}),
    ("hedgehog", {"map": "joint_softmax"}),
    ("focused", {"power": 2, "kernel_size": 3}),
    ("agent", {"agents": 2}),
    ("saga", {"gates": "keys"}),
    ("saga", {"gates": "values"}),
    ("mhla", {"blocks": 3}),
    ("lolcats", {"window": 2}),
    ("lolcats", {"window": 3, "scale_rest": True}),
    ("still", {"window": 2, "keys_per_window": 1}),
    ("still", {"window": 2, "keys_per_window": 2, "most_keys": 3}),
    ("lla", {"ridge": 0.1}),
    ("lla_uniform", {"ridge": 0.1}),
    ("delta", {"solver": "richardson"}),
    ("delta", {"solver": "chebyshev", "steps": 1}),
    ("delta", {"solver": "chebyshev", "steps": 4}),
    ("delta", {"form": "scans_2"}),
    ("kimi_delta", {"solver": "richardson", "steps": 3}),
    ("kimi_delta", {"solver": "chebyshev", "steps": 3}),
    ("kimi_delta", {"form": "scans_2"}),
    ("kimi_delta", {"form": "scans_4"}),
]


def label(value: object) -> str:
    return value if isinstance(value, str) else "-".join(str(v) for v in value.values())


@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_definition(name, options):
    """Output and gradients are those of the definition, and padding is as if it were not there."""
    grid, mixer = Grid(4, 5, 1), mixer_of(name, **options)
    inputs = [t.requires_grad_() for t in tokens(grid)]
    wanted = [*inputs, *mixer.parameters()]
    out = mixer(*inputs[:3], grid, inputs[3])
    expected = mixer.definition(*inputs[:3], grid, inputs[3])
    close(out, expected, 1e-9)
    weights = normal(*out.shape, seed=7)
    found, oracle = (
        torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True, materialize_grads=True)
        for y in (out, expected)
    )
    for gradient, exact in zip(found, oracle, strict=True):
        close(gradient, exact, 1e-7)
    padded = []
    for t in inputs:
        _, image = grid.split(t.detach())
        wide = image.new_full((2, 6, 8, *image.shape[3:]), torch.nan)
        wide[:, :4, :5] = image
        padded.append(torch.cat((t[:, :1].detach(), wide.flatten(1, 2)), dim=1))
    mask = torch.ones(2, 6, 8, dtype=torch.bool)
    mask[:, :4, :5] = False
    mask = torch.cat((mask[:, 0, :1] & False, mask.flatten(1)), dim=1)
    hidden = mixer(*padded[:3], Grid(6, 8, 1, None, mask), padded[3])
    close(hidden[~mask].unflatten(0, (2, -1)), out, 1e-9)


def test_long_sides_decay_in_chunks():
    """Sides longer than a chunk, whose chunks bring their sums to each other."""
    grid, mixer = Grid(3, 37), mixer_of("transnormer", decay="two_sided")
    q, k, v, x = tokens(grid)
    close(mixer(q, k, v, grid, x), mixer.definition(q, k, v, grid, x), 1e-9)


def test_two_sizes_of_based_give_the_same():
    q, k, v, x = tokens(grid := Grid(3, 4))
    full, half = (mixer_of("based", expansion=size) for size in ("full", "symmetric"))
    close(full(q, k, v, grid), half(q, k, v, grid), 1e-12)


def test_order_without_end_is_softmax():
    """With small queries, the polynomial of order 3 with the sum is softmax to its fourth order."""
    q, k, v, _ = tokens(grid := Grid(3, 4))
    mixer = mixer_of("taylor", degree=3, norm="sum")
    out = mixer(0.1 * q, k, v, grid)
    close(out, mixer_of("softmax")(0.1 * q, k, v, grid), 1e-3)


def test_flow_is_conserved():
    """Flows that compete add up to the number of queries: their mean is 1, and the clamp ties."""
    q, k, v, _ = tokens(grid := Grid(3, 4))
    f, g = q.sigmoid(), k.sigmoid()
    incoming = (f * g.sum(1, keepdim=True)).sum(-1, keepdim=True)
    competing = (g * (f / incoming).sum(1, keepdim=True)).sum(-1)
    close(competing.mean(1), torch.ones(2, HEADS, dtype=torch.float64), 1e-12)
    free, tied = mixer_of("flowformer", clamp=False), mixer_of("flowformer")
    assert (free(q, k, v, grid) - tied(q, k, v, grid)).abs().max() > 1e-3


def test_exponential_of_hedgehog_needs_no_shift():
    """Shifts divide out: the paper's form has none."""
    q, k, v, _ = tokens(grid := Grid(3, 4))
    mixer = mixer_of("hedgehog", map="exp")
    u, w = (
        torch.einsum("bnhd,hde->bnhe", t, m)
        for t, m in ((q, mixer.query_weight), (k, mixer.key_weight))
    )
    weights = torch.einsum("bnhd,bmhd->bhnm", u.exp(), w.exp())
    weights = weights + torch.einsum("bnhd,bmhd->bhnm", (-u).exp(), (-w).exp())
    expected = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)
    close(mixer(q, k, v, grid), expected, 1e-2)
