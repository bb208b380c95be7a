"""Multiply-adds: the rules of counting, and the numbers of the released code."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests.pairwise import siblings_by_night, some_by_night
from vitlinear import ops
from vitlinear.cards.count import Cost, count
from vitlinear.errors import UserError
from vitlinear.facts import convention, counts, families
from vitlinear.models import input_size, our_models

TABLE = Path(__file__).parents[1] / "data" / "multiply_adds.csv"
NAMES = {
    facts.released: name
    for family in families().values()
    for name, facts in family.models.items()
    if facts.released
}


def released_rows():
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    return [pytest.param(row, id=row["released"]) for row in csv.DictReader(lines)]


@pytest.mark.parametrize("row", released_rows())
def test_released_code(row):
    """To 1%, and what rounding to the decimals printed leaves open."""
    name = NAMES[row["released"]]
    counted, side = counts()[name], int(row["input"])
    counted = {**counted, "products": counted["projections"] + counted["attention"]}
    assert counted["input_size"] == [3, side, side]
    parts = [part for part in ("total", "projections", "attention", "products") if row[part]]
    assert parts
    for part in parts:
        expected = float(row[part])
        rounding = 0.5 * 10.0 ** -len(row[part].partition(".")[2])
        assert abs(counted[part] / 1e9 - expected) <= 0.01 * expected + rounding, part


def recount(name: str) -> None:
    cost, entry = count(timm.create_model(name), input_size(name)), counts()[name]
    parts = ("total", "projections", "attention", "norms")
    assert cost == Cost(**{part: entry[part] for part in parts})


@siblings_by_night(name for name in our_models() if name.startswith("test_"))
def test_recount_small(name):
    recount(name)


# A family's other sizes are counted by the same rules.
SMALLEST = {
    min(models, key=lambda name: counts()[name]["params"])
    for family in families().values()
    if (models := [name for name in family.models if not name.startswith("test_")])
}


# The small ones above are of all families: of these a third is counted in every run.
@some_by_night("name", our_models(tests=False), sorted(SMALLEST)[::3])
def test_recount(name):
    recount(name)


def test_the_same_for_registered_operators():
    size = input_size("test_ravlt")
    cost = count(timm.create_model("test_ravlt", attn_backend="library"), size)
    assert cost.projections == counts()["test_ravlt"]["projections"]
    assert cost.attention == pytest.approx(counts()["test_ravlt"]["attention"], rel=0.01)


class Products(nn.Module):
    """One of each thing that is counted, with sizes that tell them apart."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv = nn.Conv2d(3, 5, 2, bias=False)
        self.linear = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.rms = nn.RMSNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.flatten(2).transpose(1, 2)[:, :, None, :].expand(-1, -1, 2, -1)  # [1, 16, 2, 3]
        if self.what == "conv":
            return self.conv(x)
        if self.what == "linear":
            return self.linear(x)
        if self.what == "sdpa":
            short = q[:, :5]
            heads = (t.transpose(1, 2) for t in (q, short, short))
            return F.scaled_dot_product_attention(*heads)
        if self.what == "library":
            return ops.linear_attention(q, q, q, mechanism="elu", backend="library")
        if self.what == "library softmax":
            return ops.softmax_attention(q, q, q, backend="library")
        if self.what == "matmul":
            return x @ x.transpose(-1, -2)
        if self.what == "rms":
            return self.rms(x)
        return self.norm(x)


@pytest.mark.parametrize(
    "what, part, expected",
    [
        ("conv", "projections", 3 * 3 * 5 * 3 * 2 * 2),
        ("linear", "projections", 3 * 4 * 4 * 6),
        ("sdpa", "attention", 2 * 16 * 5 * (3 + 3)),
        ("library", "attention", 16 * 2 * 3 * (2 * 3 + 1)),
        ("library softmax", "attention", 2 * 16 * 16 * (3 + 3)),
        ("matmul", "attention", 3 * 4 * 4 * 4),
        ("norm", "norms", 2 * 48),
        ("rms", "norms", 4 * 48),
    ],
)
def test_rules(what, part, expected):
    model = Products(what).train()
    cost = count(model, (3, 4, 4))
    assert getattr(cost, part) == expected == cost.total
    assert model.training  # as it was found


def test_fvcore_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(UserError, match="pip install fvcore"):
        count(nn.Identity(), (3, 4, 4))


@pytest.mark.parametrize(
    "published, expected", [(4.6, "projections"), (4.9, "total"), (4.7, "neither")]
)
def test_convention(published, expected):
    assert convention(published, {"projections": 4.506e9, "total": 4.899e9}) == expected
