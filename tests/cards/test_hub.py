"""Pushing to the Hugging Face hub and loading from there, through timm; a folder is the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.errors
import pytest
import timm
import torch
import yaml
from timm.models import _hub, push_to_hf_hub

from vitlinear import replace_attention
from vitlinear.cards.hub import model_card
from vitlinear.facts import families
from vitlinear.models import our_models

REPO = "someone/my-model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's copy of the repository, behind the calls that timm makes of its client."""

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id, filename, **kwargs):
            return (tmp_path / repo_id / filename).is_file()

        def upload_folder(self, repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, **kwargs):
        path = tmp_path / repo_id / filename
        if not path.is_file():
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(_hub, "HfApi", Api)
    monkeypatch.setattr(_hub, "hf_hub_download", download)
    return tmp_path / REPO


@pytest.mark.parametrize("name", ["test_ravlt", "test_inline_deit", "test_l2vit"])
def test_push_and_load(name, hub):
    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=1, num_classes=5).eval()
    push_to_hf_hub(model, REPO, model_card=model_card(model), safe_serialization=True)
    assert {file.name for file in hub.iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    config = json.loads((hub / "config.json").read_text("utf-8"))
    assert config["architecture"] == name and config["num_classes"] == 5
    assert config["pretrained_cfg"]["input_size"][0] == 1
    assert config["num_features"] == model.num_features
    x = torch.randn(2, 1, 64, 80)
    for source in (f"hf-hub:{REPO}", f"local-dir:{hub}"):
        again = timm.create_model(source, pretrained=True).eval()
        assert type(again) is type(model) and torch.equal(again(x), model(x))


def test_push_and_load_a_model_with_replaced_attentions(hub):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    replace_attention(model, "mala", "-2:")
    push_to_hf_hub(model, REPO, model_card=model_card(model), safe_serialization=True)
    text = (hub / "README.md").read_text("utf-8")
    assert "- **Model:** timm's test_vit" in text and "mala in blocks 4, 5" in text
    again = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(again(x), model(x))


def test_card_on_the_hub(hub):
    model = timm.create_model("test_ravlt", num_classes=5)
    push_to_hf_hub(model, REPO, model_card=model_card(model, repo_id=REPO))
    _, header, text = (hub / "README.md").read_text("utf-8").split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["license"] == "mit" and fields["library_name"] == "timm"
    assert fields["pipeline_tag"] == "image-classification"
    assert {"vitlinear", "linear-attention", "arxiv:2411.07635"} <= set(fields["tags"])
    assert "# Model card for my-model" in text and "RALA" in text
    assert "- **Classes:** 5" in text and "import vitlinear" in text
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in text


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith("test_") else pytest.mark.nightly)
        for name in our_models()
    ],
)
def test_a_card_for_every_model(name):
    """Licence and paper are those of the family's card."""
    by_paper = {f"arxiv:{family.paper['arxiv']}": family for family in families().values()}
    card = model_card(timm.create_model(name, device="meta"))
    family = next(by_paper[tag] for tag in card["tags"] if tag in by_paper)
    assert card["license"] == family.hub_license and name in card["details"]["Model"]


def test_own_licence():
    model = timm.create_model("test_mavit")
    assert model_card(model)["license"] == families()["mala"].hub_license
    assert model_card(model, license="cc-by-4.0")["license"] == "cc-by-4.0"
