"""Names, options and descriptions of the registry, and mistakes in them."""

from __future__ import annotations

import json

import pytest
import torch

import vitlinear
from vitlinear.mixers import Option, find_mixer, list_attentions, make_mixer
from vitlinear.mixers.description import ORDERS


@pytest.mark.quick
def test_mistakes_are_one_line_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"^unknown attention 'mla'.*mala") as caught:
        vitlinear.create_attention("mla", 16, 2)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="mala has no option 'window'; it has: none"):
        vitlinear.create_attention("mala", 16, 2, window=3)
    with pytest.raises(ValueError, match="a mapping with 'name'"):
        make_mixer({"window": 3}, 16, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not divide"):
        vitlinear.create_attention("mala", 16, 3)
    with pytest.raises(ValueError, match="rope needs heads of a multiple of 4"):
        vitlinear.create_attention("mala", 12, 2, rope=True)
    with pytest.raises(ValueError, match="13 tokens are not the 0 and 3 x 4"):
        vitlinear.create_attention("mala", 16, 2)(torch.zeros(1, 13, 16), 3, 4)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (Option(2, "", low=1, high=3), 4, "of must be int from 1 to 3, got 4"),
        (Option(2, "", low=1), True, "of must be int, at least 1, got True"),
        (Option(0.5, "", low=0.0), float("nan"), "float, at least 0.0, got nan"),
        (Option("exp", "", choices=("exp", "softmax")), "softmx", "did you mean softmax"),
        (Option(True, ""), 1, "True, False, got 1"),
    ],
)
def test_values_out_of_range(option, value, message):
    with pytest.raises(ValueError, match=message):
        option.check("it", "of", value)


def test_values_in_range():
    assert Option(2, "", low=1, high=3).check("it", "of", 3) == 3
    assert type(Option(0.5, "", low=0.0).check("it", "of", 1)) is float
    assert Option(None, "", kind=int, low=1).check("it", "of", None) is None


def test_descriptions():
    """Every description is complete, and can be written as JSON."""
    for name in list_attentions():
        description = vitlinear.describe_attention(name)
        assert description.name == name and description.order in ORDERS
        for text in ("formula", "paper", "title", "cost", "state"):
            assert getattr(description, text) and "\n" not in getattr(description, text)
        assert 2015 <= description.year <= 2026
        assert json.loads(json.dumps(description.as_dict()))["name"] == name
        for option_name, option in description.options.items():
            option.check(name, option_name, option.default)
            assert option.meaning
        assert find_mixer(name).__doc__


def test_options_change_descriptions():
    """A description with an option says what the option changes."""
    describe = vitlinear.describe_attention
    assert describe("delta").order == "free"
    assert describe("delta", form="scans_2").order == "directional"
    assert describe("transnormer", decay="two_sided").order == "local"
    assert describe("saga", gates="keys").rows_sum_to_one
    assert not describe("saga", gates="values").rows_sum_to_one
    assert describe("taylor", norm="sum", degree=3).rows_sum_to_one
    assert not describe("taylor", norm="sum", degree=3).positive
    with pytest.raises(ValueError, match="did you mean"):
        describe("delta", from_="scans_2")
    for name in list_attentions():
        description = find_mixer(name).description
        assert describe(name) == description  # true of the default options
        for change in description.changes:
            for value in change.values:
                changed = describe(name, **{change.option: value})
                for field, expected in change.fields.items():
                    assert getattr(changed, field) == expected != getattr(description, field)


def test_filters():
    assert vitlinear.list_attentions("*net") == ["lightnet"]
    assert "softmax" in list_attentions(lambda d: d.quadratic)
    assert "mala" not in list_attentions(lambda d: d.quadratic)
    assert list_attentions() == sorted(list_attentions())
