"""The table of published files, and that models fetch what it says."""

from __future__ import annotations

import re

import pytest
import timm

import vitlinear  # noqa: F401  registers the models
from vitlinear.facts import (
    NONE_STATED,
    PUBLISHED,
    pretrained_source,
    published_at,
    published_files,
)

WIRED = [row for row in PUBLISHED if row.wired]


@pytest.mark.quick
@pytest.mark.parametrize("row", WIRED, ids=lambda row: f"{row.model}.{row.tag}")
def test_every_confirmed_file_is_wired(row):
    cfg = timm.get_pretrained_cfg(f"{row.model}.{row.tag}")
    assert cfg is not None, f"{row.model} has no tag {row.tag}"
    if row.hub_id:
        assert (cfg.hf_hub_id, cfg.hf_hub_filename, cfg.url) == (row.hub_id, row.filename, None)
    else:
        assert (cfg.url, cfg.hf_hub_id) == (row.url, None)
    assert cfg.license == (None if row.license == NONE_STATED else row.license)


def our_tags():
    for name in timm.list_models():
        if timm.model_entrypoint(name).__module__.startswith("vitlinear."):
            yield from timm.list_pretrained(f"{name}.*")


def test_nothing_else_is_wired():
    """A source that no row confirms would be a guess."""
    tags = set(our_tags())
    assert "ravlt_t.in1k" in tags
    assert tags <= {f"{row.model}.{row.tag}" for row in WIRED}


def test_rows_are_well_formed():
    # A folder whose files have no known names stands for the weights of several models.
    places = [
        (row.hub_id, row.filename, row.url)
        for row in PUBLISHED
        if not (row.url or "").endswith("/tree/main")
    ]
    assert len(set(places)) == len(places)
    assert len({(row.model, row.tag, row.task) for row in PUBLISHED}) == len(PUBLISHED)
    for row in PUBLISHED:
        assert bool(row.hub_id) != bool(row.url), row
        assert row.source and row.license, row
        assert row.location.startswith("https://"), row
        assert row.sha256 is None or re.fullmatch("[0-9a-f]{8,64}", row.sha256), row
        if row.url and row.filename:
            assert row.url.endswith(f"/{row.filename}"), row


def test_a_link_without_a_file_name_is_listed_and_not_wired():
    (row,) = published_files("inline_deit_tiny")
    assert row.url and not row.wired
    assert pretrained_source("inline_deit_tiny") == {}


def test_pretrained_source():
    assert pretrained_source("ravlt_b") == {
        "hf_hub_id": "aldjalkdf/RAVLT",
        "hf_hub_filename": "RAVLT_B.pth",
        "license": "mit",
    }
    assert "license" not in pretrained_source("mavit_l")
    assert pretrained_source("mavit_t") == {}
    release = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0/"
    assert pretrained_source("l2vit_base")["url"] == release + "L2ViT-Base-checkpoint-best-ema.pth"
    assert "22k-pretrain" in pretrained_source("l2vit_base.in22k")["url"]


def test_published_at():
    assert published_at("aldjalkdf/MAViT", "MAViT_L.pth", None).sha256 == "17ea9be6"
    assert published_at("aldjalkdf/MAViT", "MAViT_X.pth", None) is None
    assert published_at(None, None, PUBLISHED[-1].url) is PUBLISHED[-1]
