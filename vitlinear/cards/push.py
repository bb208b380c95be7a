"""The ``push`` command: a trained model to a folder of the Hugging Face hub's form, or to the hub.

The folder is what timm and transformers open: weights, README, and a ``config.json`` with classes
and preprocessing as they were in training.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from vitlinear._timm import generate_readme
from vitlinear.checkpoints.card import Card, read_card
from vitlinear.checkpoints.load import load_model
from vitlinear.checkpoints.read import read_metadata
from vitlinear.cli.parser import Parser
from vitlinear.create import data_config
from vitlinear.errors import UserError, one_line
from vitlinear.facts import family_of
from vitlinear.files import check_parent

from .hub import model_card

HUB, UNKNOWN = "hf-hub", "unknown"
README, CONFIG, WEIGHTS = "README.md", "config.json", "model.safetensors"


def main(argv: Sequence[str] | None, prog: str = "vitlinear push") -> None:
    """Runs ``vitlinear push``."""
    parser = Parser(
        prog=prog,
        description="Bring a trained model to the Hugging Face hub, or to a folder of its form: "
        "weights, README, and a config.json with classes and preprocessing as in training. "
        "timm.create_model('hf-hub:OWNER/NAME', pretrained=True) and ('local-dir:FOLDER', ...) "
        "load it.",
    )
    parser.add_argument(
        "source",
        metavar="RUN",
        type=Path,
        help="folder of a run, of which best.safetensors is taken; or a file of weights that "
        "`vitlinear train`, `convert` or `export` wrote",
    )
    parser.add_argument(
        "target", metavar="TARGET", help="a new folder, or hf-hub:OWNER/NAME on the hub"
    )
    parser.add_argument(
        "--license",
        default=None,
        metavar="ID",
        help="the hub's identifier of the weights' licence: apache-2.0, mit, ... (default: of "
        "weights that `convert` knows, the authors'; else unknown)",
    )
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    args = parser.parse_args(argv)
    source = weights_file(args.source.expanduser())
    license = args.license or licence_of(source)
    name = args.target.removeprefix(f"{HUB}:")
    if name != args.target:
        push(source, name, license, private=args.private)
        call = args.target
    else:
        if args.private:
            raise UserError(f"--private is for {HUB}:OWNER/NAME, a repository on the hub")
        folder = Path(args.target).expanduser()
        write_folder(source, folder, license)
        call = f"local-dir:{folder}"
    hint = " (--license ID says it)" if license == UNKNOWN else ""
    print(f"licence       {license}{hint}")
    print(f"wrote         {args.target}")
    print(f'load          timm.create_model("{call}", pretrained=True), after import vitlinear')


def weights_file(source: Path) -> Path:
    """The file of weights of a run, or the file itself.

    Raises:
        UserError: There is none, or it does not say what it is.
    """
    path = source / "best.safetensors" if source.is_dir() else source
    if source.is_dir() and not path.is_file():
        raise UserError(f"{source} is no run of `vitlinear train`: it has no {path.name}")
    if read_card(path) is None:
        raise UserError(
            f"checkpoint {path} does not say which model it is: `vitlinear convert {path} "
            "OUT.safetensors` makes a file that does"
        )
    return path


def licence_of(path: Path) -> str:
    """The hub's identifier of the licence of published weights; of others, that it is unknown."""
    card = read_card(path)
    published = card is not None and "published_at" in read_metadata(path)
    return family_of(card.model.partition(".")[0]).hub_license if card and published else UNKNOWN


def write_folder(path: Path, folder: Path, license: str, repo_id: str | None = None) -> None:
    """Write a folder that is like a repository of the hub; it appears whole or not at all.

    Args:
        path: A file of weights that describes itself.
        folder: Does not exist yet, or is empty.
        license: The hub's identifier of a licence.
        repo_id: Where it will be on the hub, for the README; None if nobody knows.

    Raises:
        UserError: It is there already, cannot be written, or timm does not get the same model back
            from it.
    """
    check_parent(str(folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: give another name")
    model, card = load_model(path)
    assert card is not None
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            whole = Path(scratch) / folder.name
            _write_config(model, card, whole, license)
            shutil.copyfile(path, whole / WEIGHTS)  # with the card in it, for `vitlinear validate`
            readme = generate_readme(
                model_card(model, license, repo_id, card), (repo_id or folder.name).split("/")[-1]
            )
            (whole / README).write_text(readme, encoding="utf-8")
            _verify(model, whole)
            whole.replace(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or one_line(error)}") from error


def push(path: Path, repo_id: str, license: str, private: bool = False) -> None:
    """Upload what `write_folder` makes to the Hugging Face hub; a README that is there stays.

    Args:
        path: A file of weights that describes itself.
        repo_id: ``OWNER/NAME``; made if it does not exist.
        license: The hub's identifier of a licence.
        private: Make a new repository private.

    Raises:
        UserError: The hub refuses, or is not reached; or as `write_folder`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{HUB}:{repo_id} is no name on the hub: {one_line(error)}") from error
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "repository"
        write_folder(path, folder, license, repo_id)
        try:
            api = HfApi(library_name="timm", library_version=timm.__version__)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                ignore_patterns=[README] if api.file_exists(repo, README) else None,
                commit_message="Add model",
            )
        except Exception as error:  # its HTTP client's errors have no base class in common
            raise UserError(f"cannot push to {HUB}:{repo_id}: {one_line(error)[:300]}") from error


def _write_config(model: nn.Module, card: Card, folder: Path, license: str) -> None:
    """Let timm save a model, and make of its ``config.json`` one that transformers opens too."""
    names = {"label_names": card.class_names} if card.class_names else {}
    about = {**names, "pretrained_cfg": {"license": license}}
    save_for_hf(model, folder, model_config=about, safe_serialization=True)
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # It stands beside, too. transformers gives it to the constructor, and then these arguments.
    config["model_args"].pop("num_classes", None)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _verify(model: nn.Module, folder: Path) -> None:
    """Raise `UserError` if timm makes another model of a folder than the one that is in it."""
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    trained, weights = model.state_dict(), again.state_dict()
    same = weights.keys() == trained.keys() and all(
        torch.equal(value, weights[key]) for key, value in trained.items()
    )
    if not same or data_config(again, {}) != data_config(model, {}):
        raise UserError(
            f"{folder.name} was not written: timm makes another model of it than was trained; "
            "report this model"
        )
