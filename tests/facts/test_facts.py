"""The facts file fits the registry and the table of published files."""

from __future__ import annotations

import re

import pytest
import timm

from vitlinear import models as registry
from vitlinear.facts import PUBLISHED, counts, families, family_of

FAMILIES = families().values()


@pytest.mark.parametrize("name", registry.our_models())
def test_every_model_has_facts(name):
    family = family_of(name)
    assert family.model(name).attention
    paper = timm.get_pretrained_cfg(name).paper_ids
    assert paper == f"arXiv:{family.paper['arxiv']}"


@pytest.mark.quick
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_rows_are_of_this_family(family):
    for name in family.models:
        if timm.is_model(name):
            assert family_of(name) is family
    published = {model.published.source for model in family.models.values() if model.published}
    assert published == {text.strip() for text in family.sources.values()}


def test_unknown_models():
    with pytest.raises(KeyError, match="add it to rala"):
        families()["rala"].model("ravlt_xl")


@pytest.mark.quick
def test_published_parameters():
    """Within rounding of ours, but for those that the card says differ."""
    differ = set()
    for family in FAMILIES:
        for name, model in family.models.items():
            if model.published and model.published.params and name in counts():
                params = counts()[name]["params"] / 1e6
                decimals = 1 if isinstance(model.published.params, float) else 0
                if abs(params - model.published.params) > 0.51 * 10**-decimals:
                    differ.add(name)
    noted = {"nalaformer_xt", "nalaformer_t", "inline_pvt_large", "inline_swin_tiny"}
    noted |= {f"inline_cswin_{size}" for size in ("tiny", "small", "base")} | {"mila_tiny"}
    assert differ <= noted
    assert "nalaformer_xt" in differ


def test_published_costs_follow_what_the_cards_say():
    from vitlinear.facts import convention

    expected = {"rala": "projections", "mala": "projections"}
    expected |= dict.fromkeys(("inline", "l2vit", "mila"), "total")
    for family in FAMILIES:
        for name, model in family.models.items():
            if model.published and name in counts() and family.name in expected:
                assert convention(model.published.macs, counts()[name]) == expected[family.name]


def test_tags_of_accuracies_exist():
    files = {(row.model, row.tag) for row in PUBLISHED}
    for family in FAMILIES:
        models = {row.model for row in PUBLISHED if row.family == family.name}
        for name, model in family.models.items():
            if model.published and name in models and len(model.published.top1) > 1:
                assert all((name, tag) in files for tag in model.published.top1)


def test_families_of_published_files():
    assert {row.family for row in PUBLISHED} <= families().keys()
    for row in PUBLISHED:
        assert row.model in families()[row.family].models, row


def test_secondary_sources_are_marked():
    mala = families()["mala"]
    assert all(model.published.secondary for model in mala.models.values())
    assert not any(m.published.secondary for m in families()["rala"].models.values())


def test_lightnet_claims_nothing():
    lightnet = families()["lightnet"]
    assert not any(model.published for model in lightnet.models.values())
    text = " ".join(lightnet.notes)
    assert "no published accuracy belongs to them" in text and "Inferred" in text


def test_public_sources_only():
    """Every source can be looked up by a reader of the card."""
    for family in FAMILIES:
        for text in family.sources.values():
            assert re.search(r"README|readme|repository|arXiv|third-party", text), text
