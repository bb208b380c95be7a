"""``pretrained=True`` against a server on this machine: it loads, or fails and keeps nothing."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch

import vitlinear  # noqa: F401  registers the models
from tests.checkpoints.loopback import Server, serve
from vitlinear.checkpoints import download
from vitlinear.checkpoints.download import DownloadError, ensure_downloaded
from vitlinear.checkpoints.read import CheckpointError
from vitlinear.facts import PublishedFile
from vitlinear_cli import main

MODEL = "test_ravlt"
REPO = "authors/Weights"
NOBODY = "http://127.0.0.1:9/{filename}"


@pytest.fixture(scope="module")
def content() -> bytes:
    """A checkpoint file whose first weight is all sevens."""
    torch.manual_seed(0)
    weights = timm.create_model(MODEL).state_dict()
    weights["stem.conv1.conv.weight"].fill_(7)
    buffer = io.BytesIO()
    torch.save({"model": weights, "epoch": 299}, buffer)
    return buffer.getvalue()


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    """The server, with both libraries' caches in a folder of the test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    constants = huggingface_hub.constants
    with serve() as running:
        running.files["W.pth"] = content
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # It tries an interrupted download again, after pauses; what it does then is its own affair.
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        yield running


def source(server: Server, kind: str, name: str = "W.pth") -> dict[str, str | None]:
    """Where a file is, as a pretrained_cfg says it."""
    if kind == "hub":
        return {"hf_hub_id": REPO, "hf_hub_filename": name, "url": None}
    return {"url": f"{server.address}/{kind}/{name}", "hf_hub_id": None, "hf_hub_filename": None}


def create(where: dict[str, str | None], **kwargs):
    return timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=where, **kwargs)


def is_loaded(model) -> bool:
    return bool((model.stem.conv1.conv.weight == 7).all())


def kept(folder: Path) -> list[Path]:
    """Files that a later call could take for weights, temporary ones included."""
    return [
        file
        for file in folder.rglob("*W*")
        if file.is_file() and ".no_exist" not in file.parts  # the hub client's note of a 404
    ] + [file for blobs in folder.rglob("blobs") for file in blobs.iterdir()]


@pytest.mark.parametrize("kind", ["hub", "plain", "moved"])
def test_fetched_once_then_from_the_cache(server, monkeypatch, kind):
    assert is_loaded(create(source(server, kind)))
    fetches = [path for method, path in server.requests if method == "GET" and "W.pth" in path]
    assert fetches
    server.files.clear()
    if kind == "hub":  # its cache answers when the hub does not
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOBODY)
    assert is_loaded(create(source(server, kind)))
    again = [path for method, path in server.requests if method == "GET" and "W.pth" in path]
    assert again == fetches


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        *((kind, fault) for kind in ("hub", "plain") for fault in ("short", "damaged", "absent")),
        ("plain", "chunk"),
    ],
)
def test_a_failed_download_says_so_and_leaves_nothing(server, tmp_path, content, kind, fault):
    # The hub says what the SHA-256 should be; a plain address only by the name of the file.
    good = f"W-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[good] = content
    if fault == "absent":
        del server.files[good]
    else:
        server.faults[good] = fault
    message = {"short": "broke off|Consistency|size|peer closed", "damaged": "damaged"}
    message["chunk"] = "IncompleteRead"
    with pytest.raises(DownloadError, match=message.get(fault, "404")) as caught:
        create(source(server, kind, good))
    assert good in str(caught.value) and "\n" not in str(caught.value)
    assert kept(tmp_path) == []
    server.faults.clear()
    server.files[good] = content
    assert is_loaded(create(source(server, kind, good)))


def test_a_half_file_that_another_program_left_is_to_be_deleted(server, content, tmp_path):
    path = ensure_downloaded(source(server, "plain"))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{path}.*delete the file, and it is fetched again"):
        create(source(server, "plain"))


def test_cache_dir_of_the_caller(server, tmp_path):
    for kind in ("hub", "plain"):
        assert is_loaded(create(source(server, kind), cache_dir=tmp_path / kind))
        assert kept(tmp_path / kind)
    assert not (tmp_path / "hub" / f"models--{REPO}").exists()
    assert not (tmp_path / "torch").exists()


def test_plain_files_can_be_read_by_others(server, tmp_path):
    old = os.umask(0o022)
    try:
        path = ensure_downloaded(source(server, "plain"))
    finally:
        os.umask(old)
    assert path is not None and path.stat().st_mode & 0o777 == 0o644
    assert [file.name for file in path.parent.iterdir()] == ["W.pth"]


@pytest.mark.parametrize("kind", ["hub", "plain"])
@pytest.mark.parametrize("what", ["size", "sha256"])
def test_a_file_that_is_not_the_recorded_one(server, monkeypatch, content, kind, what):
    """Whole, and what its host says it is, but replaced since its facts were written down."""
    facts = {"size": len(content) + 1} if what == "size" else {"sha256": "0" * 8}
    place = (
        {"hub_id": REPO, "filename": "W.pth"}
        if kind == "hub"
        else {"url": source(server, kind)["url"], "filename": "W.pth"}
    )
    row = PublishedFile("rala", MODEL, **place, **facts)
    monkeypatch.setattr(download, "published_at", lambda *where: row)
    for _ in range(2):  # from the hub's cache too
        with pytest.raises(DownloadError, match="not the file that this version"):
            create(source(server, kind))
    correct = PublishedFile(
        "rala", MODEL, **place, size=len(content), sha256=hashlib.sha256(content).hexdigest()[:8]
    )
    monkeypatch.setattr(download, "published_at", lambda *where: correct)
    assert is_loaded(create(source(server, kind)))


def test_unreachable(server, monkeypatch):
    with pytest.raises(DownloadError, match="cannot download http://127.0.0.1:9/"):
        create({"url": "http://127.0.0.1:9/W.pth", "hf_hub_id": None})
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOBODY)
    with pytest.raises(DownloadError, match="cannot download W.pth of authors/Weights"):
        create(source(server, "hub"))


def test_an_address_without_a_file_name(server):
    with pytest.raises(DownloadError, match="no file name.*file="):
        create({"url": f"{server.address}/f/1d6b81/?dl=1", "hf_hub_id": None})


def test_a_share_link_is_named():
    with pytest.raises(DownloadError, match="tsinghua.edu.cn/f/1d6b.*file="):
        timm.create_model("inline_deit_tiny", pretrained=True)


@pytest.mark.parametrize("key", ["file", "state_dict"])
def test_local_sources_go_first(server, tmp_path, content, key):
    path = tmp_path / "local.pth"
    path.write_bytes(content)
    local = str(path) if key == "file" else torch.load(path)["model"]
    assert is_loaded(create({**source(server, "hub"), key: local}))
    assert server.requests == []


def test_not_pretrained_asks_nobody(server):
    timm.create_model(MODEL, pretrained_cfg_overlay=source(server, "hub"))
    assert server.requests == []


def test_the_command_says_it_in_one_line(server, capsys):
    assert main(["predict", "--model", "ravlt_t", "--pretrained", __file__]) == 2
    error = capsys.readouterr().err
    assert "RAVLT_T.pth" in error and "404" in error and error.count("\n") == 1


@pytest.mark.process
@pytest.mark.slow
def test_a_whole_process_with_the_environment_of_a_mirror(server, tmp_path):
    """The settings of a user of a mirror: the model's own hub id and file name."""
    buffer = io.BytesIO()
    torch.save({"model_ema": timm.create_model("ravlt_t").state_dict()}, buffer)
    server.files["RAVLT_T.pth"] = buffer.getvalue()
    environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
    program = "import timm, vitlinear; timm.create_model('ravlt_t', pretrained=True)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    paths = [path for _, path in server.requests]
    assert any(path.startswith("/aldjalkdf/RAVLT/resolve/main/RAVLT_T.pth") for path in paths)


def test_convert_fetches_what_is_published(server, content, tmp_path, capsys):
    """By the address that the model cards list; through the same checks, kept in the same cache."""
    address = "https://huggingface.co/aldjalkdf/RAVLT/resolve/main/{}"
    target = tmp_path / "out.safetensors"
    server.files["RAVLT_T.pth"] = content
    arguments = ["convert", address.format("RAVLT_T.pth"), str(target), "--model", MODEL]
    assert main(arguments) == 0 and target.exists()
    assert any("/aldjalkdf/RAVLT/resolve/main/RAVLT_T.pth" in path for _, path in server.requests)
    target.unlink()
    server.files["RAVLT_B.pth"] = content
    for name, message in (
        ("RAVLT_B.pth", "not 579479431: it is not the file"),
        ("RAVLT_S.pth", "cannot download RAVLT_S.pth of aldjalkdf/RAVLT"),
        ("other.pth", "is not the address of a published file"),
    ):
        capsys.readouterr()
        assert main(["convert", address.format(name), str(target), "--model", MODEL]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
        assert not target.exists()
