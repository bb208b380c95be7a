"""Descriptions of weights against weights: of every attention, with options that change them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tests.mixers.test_contract import DIM, HEADS, mixer_of, tokens
from vitlinear import create_attention, replace_attention
from vitlinear.mixers import Grid, describe_attention, find_mixer, list_attentions

SPECS: list[dict[str, Any]] = [{"name": name} for name in list_attentions()]
SPECS += [
    {"name": name, change.option: value}
    for name in list_attentions()
    for change in find_mixer(name).description.changes
    for value in change.values
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))
@torch.no_grad()
def test_weights_are_as_described(spec):
    """At random parameters, of a small map: their signs, their sums, and the length of a query."""
    mixer, (q, k, v, x) = mixer_of(**spec), tokens(grid := Grid(3, 9), batch=1)
    number = grid.length

    def weights(q: torch.Tensor) -> torch.Tensor:
        """[N keys, N queries, h, D]: what each query gets of values that are 1 at one key."""
        one = torch.eye(number, dtype=q.dtype)[:, :, None, None].expand(-1, -1, HEADS, DIM)
        return mixer(*(t.expand(number, *t.shape[1:]) for t in (q, k)), one, grid,
                     x.expand(number, *x.shape[1:]))  # fmt: skip

    found = weights(q)
    longer = q.clone()
    longer[:, 7] *= 2
    out = mixer(q, k, v, grid, x)
    change = (mixer(longer, k, v, grid, x) - out)[:, 7].abs().max() / out[:, 7].abs().max()
    off = (mixer(q, k, torch.ones_like(v), grid, x) - 1).abs().max()
    description = describe_attention(**spec)
    assert (
        bool((found >= -1e-9 * found.abs().max()).all()),
        bool(off < 1e-3),  # which the small numbers in denominators stay under
        bool(change > 1e-3),
    ) == (description.positive, description.rows_sum_to_one, description.query_magnitude)


@pytest.mark.parametrize("function", [create_attention, replace_attention])
def test_no_option_has_the_name_of_an_argument(function):
    """It could never be given."""
    taken = inspect.signature(function).parameters.keys()
    for name in list_attentions():
        assert not taken & find_mixer(name).description.options.keys(), name
