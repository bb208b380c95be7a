"""Attentions by name on bands of rows: exact, or refused with one line."""

from __future__ import annotations

import pytest

from tests.as_trained import make
from tests.mixers.test_contract import each
from tests.streaming.test_exact import check
from vitlinear.errors import UserError
from vitlinear.mixers import list_attentions, make_mixer
from vitlinear.rows.reach import check_layer, definer

pytestmark = pytest.mark.usefixtures("all_memory_free")

BANDED = [
    name for name in list_attentions() if "row_rule" in vars(definer(make_mixer(name, 16, 2)))
]


def test_pyramid():
    """Mixers that are not the pyramids' own: a convolution, learned powers, a step of descent."""
    types = ("mila", "polaformer", "vittt", "elu")
    assert set(types) <= set(BANDED)
    check(make("test_ravlt", attn_types=types), (97, 64), band_rows=2)


@pytest.mark.parametrize("name", ["softmax", "lightnet"])
def test_tokens(name):
    """Rows of the operator in the layer by name, with a class token."""
    check(make("test_linear_deit", attention=name), (97, 64), band_rows=2)


def test_positions_with_a_class_token_are_refused():
    with pytest.raises(ValueError, match="leave the class token out, or the positions"):
        check(make("test_linear_deit", attention="mala", rope=True), (97, 64), band_rows=2)


@each
def test_others_are_refused(name):
    mixer = make_mixer(name, 16, 2).eval()
    if name in BANDED:
        check_layer(name, mixer)
        return
    with pytest.raises(UserError, match="cannot run on bands of rows"):
        check_layer(name, mixer)
