"""Attentions by name on bands of rows: exact, or refused with one line."""

from __future__ import annotations

import pytest

from tests.as_trained import make
from tests.mixers.test_contract import each
from tests.streaming.test_exact import check
from vitlinear.errors import UserError
from vitlinear.layers.band import BANDED as RULE
from vitlinear.mixers import list_attentions, make_mixer
from vitlinear.rows.reach import check_layer, row_rule

pytestmark = pytest.mark.usefixtures("all_memory_free")

BANDED = [name for name in list_attentions() if row_rule(make_mixer(name, 16, 2)) == RULE]
# Those that look at windows, blocks, parts of the map or pairs of tokens.
REFUSED = {
    "agent", "diag_attention", "lla", "lolcats", "mhla", "nats", "routing", "sea", "still",
}  # fmt: skip


@pytest.mark.parametrize(
    "types",
    [
        ("mila", "polaformer", "vittt", "elu"),
        ("lawcat", "flowformer", "efficientvim", "linfusion"),
        ("kimi_delta", "lla_uniform", "miras", {"name": "taylor", "norm": "sum"}),
        pytest.param(
            ("focused", "efficientvit", "transnormer", "norm_attention"),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ("delta", "titans", {"name": "hedgehog", "map": "exp"}, "saga"),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ("vssd", "based", "hedgehog", {"name": "delta", "solver": "chebyshev"}),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=str,
)
def test_pyramid(types):
    """Mixers in the stages of a pyramid."""
    check(make("test_ravlt", attn_types=types), (97, 64), band_rows=2)


@pytest.mark.parametrize("name", ["softmax", "lightnet", "flowformer"])
def test_tokens(name):
    """In the layer by name, with a class token."""
    check(make("test_linear_deit", attention=name), (97, 64), band_rows=2)


def test_positions_with_a_class_token_are_refused():
    with pytest.raises(ValueError, match="leave the class token out, or the positions"):
        check(make("test_linear_deit", attention="mala", rope=True), (97, 64), band_rows=2)


@pytest.mark.parametrize(
    "spec",
    [{"name": "transnormer", "decay": "two_sided"}, {"name": "delta", "form": "scans_2"}],
    ids=str,
)
def test_an_order_needs_the_whole_map(spec):
    model = make("test_ravlt", attn_types=(spec, "elu", "elu", "elu"))
    with pytest.raises(ValueError, match="take the form without an order"):
        check(model, (97, 64), band_rows=2)


def test_every_mixer_is_one_or_the_other():
    assert {*list_attentions()} - {*BANDED} == REFUSED


@each
def test_others_are_refused(name):
    mixer = make_mixer(name, 16, 2).eval()
    if name in BANDED:
        check_layer(name, mixer)
        return
    with pytest.raises(UserError, match="cannot run on bands of rows"):
        check_layer(name, mixer)
