"""Options of the attentions: each value against the definition, and what they are to bring."""

from __future__ import annotations

import pytest
import torch

from tests.mixers.test_contract import HEADS, close, mixer_of, normal, tokens
from vitlinear.mixers import Grid
from vitlinear.mixers.decay import slopes, two_sided_sums
from vitlinear.mixers.taylor import monomials, taylor_features

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
    ("mhla", {"blocks_per_side": 3}),
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
    ("titans", {"steps": 4}),
    ("miras", {"steps": 3}),
    ("nats", {"window": 2, "most_windows": 2}),
    ("routing", {"clusters": 3}),
    ("sea", {"segments": 5, "kept": 2}),
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


@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_adversarial_numbers(name, options):
    """Outputs and gradients are finite for large, small and no queries and keys."""
    for dtype in (torch.float16, torch.float32):
        mixer, grid = mixer_of(name, dtype, **options), Grid(4, 5, 1)
        for scale in (1e4, 1e-4, 0.0):
            q, k, v, x = (t.to(dtype) for t in tokens(grid))
            inputs = [
                (scale * q).requires_grad_(),
                (scale * k).requires_grad_(),
                v.requires_grad_(),
            ]
            out = mixer(*inputs, grid, x)
            assert out.isfinite().all(), f"{dtype}, scale {scale}"
            gradients = torch.autograd.grad(out.float().sum(), inputs, allow_unused=True)
            for gradient in gradients:
                assert gradient is None or gradient.isfinite().all(), f"{dtype}, scale {scale}"


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


def test_centroids_move_in_training():
    """A moving average of what they gather, and only in training."""
    q, k, v, _ = tokens(grid := Grid(3, 4))
    mixer = mixer_of("routing", clusters=2, momentum=0.5)
    before = mixer.centroids.clone()
    mixer(q, k, v, grid)
    assert torch.equal(mixer.centroids, before)
    mixer.train()(q, k, v, grid)
    assert not torch.equal(mixer.centroids, before)
    assert "centroids" in mixer.state_dict() and "centroids" not in dict(mixer.named_parameters())


def test_centroids_outlast_half_types_and_bad_batches():
    """Small moves are not rounded away, and what is not finite does not stay in the average."""
    grid = Grid(3, 4)
    q, k, v, _ = (t.bfloat16() for t in tokens(grid))
    mixer = mixer_of("routing", torch.bfloat16, clusters=2).to(torch.float16).bfloat16().train()
    before = mixer.centroids.clone()
    assert before.dtype == mixer.state_dict()["centroids"].dtype == torch.float32
    mixer(q, k, v, grid)
    moved = (mixer.centroids - before).abs()
    assert (moved > 0).all() and moved.max() < 0.01
    before = mixer.centroids.clone()
    mixer(q[:0], k[:0], v[:0], grid)
    mixer(q * torch.nan, k, v, grid)
    torch.testing.assert_close(mixer.centroids, before, rtol=0, atol=0)
    narrow = {name: value.bfloat16() for name, value in mixer.state_dict().items()}
    mixer.load_state_dict(narrow, assign=True)
    assert torch.equal(mixer.centroids, narrow["centroids"].float())
    assert mixer.centroids.dtype == torch.float32
    assert mixer.double().centroids.dtype == torch.float64
    mixer.load_state_dict(narrow, assign=True)
    assert mixer.centroids.dtype == torch.float64


def test_robust_memory_without_large_errors_is_the_plain_one():
    """Without momentum, and with no token beyond Huber's bound."""
    q, k, v, x = tokens(grid := Grid(3, 4))
    robust, plain = mixer_of("miras"), mixer_of("titans")
    with torch.no_grad():
        plain.momentum.fill_(-1e9)
        for name in ("memory", "decay"):
            getattr(plain, name).copy_(getattr(robust, name))
        plain.rate.weight.copy_(robust.rate.weight[:HEADS])
        plain.rate.bias.copy_(robust.rate.bias[:HEADS])
        robust.rate.bias[HEADS:] = 1e3
    close(robust(q, k, v, grid, x), plain(q, k, v, grid, x), 1e-12)


def test_local_regression_with_a_large_ridge_is_softmax():
    q, k, v, _ = tokens(grid := Grid(3, 4))
    mixer = mixer_of("lla")
    with torch.no_grad():
        mixer.log_ridge.fill_(25)
    close(mixer(q, k, v, grid), mixer_of("softmax")(q, k, v, grid), 1e-8)


def test_inline_is_uniform_regression_without_the_inverse():
    """InLine's read-out of the centred covariance, around 0 where the regression has kbar."""
    q, k, v, _ = tokens(grid := Grid(3, 4))
    centred_k, centred_v = k - k.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    covariance = torch.einsum("bnhd,bnhe->bhde", centred_k, centred_v) / grid.length
    read = torch.einsum("bnhd,bhde->bnhe", q, covariance) * q.shape[-1] ** -0.5
    out = v.mean(1, keepdim=True) + read
    close(mixer_of("inline")(q, k, v, grid), out, 1e-12)
    mixer = mixer_of("lla_uniform")
    with torch.no_grad():
        mixer.log_ridge.fill_(25)
    large = mixer(q, k, v, grid) - v.mean(1, keepdim=True)
    expected = torch.einsum("bnhd,bhde->bnhe", q - k.mean(1, keepdim=True), covariance)
    close(large * torch.tensor(25.0, dtype=torch.float64).exp(), expected, 1e-4)


def test_second_order_is_positive():
    """1 + x + x^2 / 2 is at least 1/2: no normaliser of Based vanishes."""
    x = 10 * normal(50, 6)
    tables = [monomials(6, 2)]
    assert (taylor_features(x, 2, tables) @ taylor_features(-x, 2, tables).T).min() >= 0.5


def test_two_sided_decay_is_two_scans():
    """A scan forward and one back, which count a token's own value twice."""
    x = normal(1, 1, 21, 1, 1, 3)
    rate = slopes(1, x.device, x.dtype).neg().exp()
    forward, back = torch.zeros_like(x), torch.zeros_like(x)
    state = torch.zeros_like(x[:, :, 0])
    for t in range(21):
        state = rate * state + x[:, :, t]
        forward[:, :, t] = state
    state = torch.zeros_like(state)
    for t in reversed(range(21)):
        state = rate * state + x[:, :, t]
        back[:, :, t] = state
    close(two_sided_sums(x, slopes(1, x.device, x.dtype), 2), forward + back - x, 1e-12)
