"""Published files in timm's caches, whole and of the right hash, before timm looks for them.

timm downloads by itself, through `torch.hub` and `huggingface_hub`. Both write to a temporary name,
but neither sees all that can go wrong: `torch.hub` takes a connection that broke off for the end of
the file, and keeps the half that it got under the final name, where every later call finds it;
`huggingface_hub` compares lengths and not contents. So a file is fetched here first, into the place
where timm then finds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch

from vitlinear.errors import one_line
from vitlinear.facts import PublishedFile, published_at

CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte
SHA256 = re.compile(r"[0-9a-f]{64}")
# torch.hub's convention, name-0123abcd.pth. Its own pattern also takes words such as "-best" for
# hashes where their letters allow it; eight digits are what it asks authors to write.
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")


class DownloadError(OSError):
    """A published file could not be had; nothing of it was kept."""


def ensure_downloaded(
    pretrained_cfg: Mapping[str, Any], cache_dir: str | Path | None = None
) -> Path | None:
    """Fetch the file that a ``pretrained_cfg`` names, unless timm's caches have it.

    Args:
        pretrained_cfg: With ``url``, or ``hf_hub_id`` and ``hf_hub_filename``, as timm resolves
            it: a ``state_dict`` or ``file`` goes before both and needs nothing.
        cache_dir: As timm's argument of that name.

    Returns:
        Where the file is, or None if there is nothing to fetch, or timm chooses which.

    Raises:
        DownloadError: It is not there, broke off, or is not the file that it should be.
    """
    if pretrained_cfg.get("state_dict") or pretrained_cfg.get("file"):
        return None
    hub_id, filename, url = (
        pretrained_cfg.get(key) for key in ("hf_hub_id", "hf_hub_filename", "url")
    )
    if hub_id:
        # Without a name, timm looks at the repository to choose one: its business.
        return _from_hub(hub_id, filename, cache_dir) if filename else None
    if isinstance(url, str) and url:
        return _from_url(url, cache_dir)
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


def _from_hub(hub_id: str, filename: str, cache_dir: str | Path | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise DownloadError(
            f"{filename} of {hub_id} is on the Hugging Face hub: pip install huggingface_hub"
        ) from error

    repo, _, revision = hub_id.partition("@")
    what = f"{filename} of {repo} on the Hugging Face hub"
    before = try_to_load_from_cache(repo, filename, cache_dir, revision or None)
    try:
        path = Path(hf_hub_download(repo, filename, revision=revision or None, cache_dir=cache_dir))
    except Exception as error:  # its HTTP client's errors have no base class in common with its own
        raise DownloadError(f"cannot download {what}: {one_line(error)}") from error

    # The hub names a large file by its SHA-256, and the cache keeps that name where it can link.
    blob = path.resolve()
    expected = blob.name if SHA256.fullmatch(blob.name) else None
    had = isinstance(before, str) and Path(before).resolve() == blob
    if expected and not had and (actual := digest(blob)) != expected:
        for copy in (path, blob):
            copy.unlink(missing_ok=True)
        raise DownloadError(
            f"{what} arrived damaged: its SHA-256 is {actual}, not {expected}; try again"
        )
    if row := published_at(repo, filename, None):
        _check_recorded(row, path, expected)
    return path


def _from_url(url: str, cache_dir: str | Path | None) -> Path:
    name = os.path.basename(urlparse(url).path)
    if not name:
        raise DownloadError(
            f"{url} has no file name: download it yourself, and give the file with "
            "pretrained_cfg_overlay=dict(file=...)"
        )
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    path = folder.expanduser() / name
    row = published_at(None, None, url)
    if not path.exists():
        _download(url, path, row)
    return path


def _download(url: str, path: Path, row: PublishedFile | None) -> None:
    """Fetch to a temporary neighbour, check it, and give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            actual = _copy(url, file)
        named = HASH_IN_NAME.search(path.name)
        if named and not actual.startswith(named[1]):
            raise DownloadError(
                f"{url} arrived damaged: its SHA-256 is {actual}, its name says {named[1]}...; "
                "try again"
            )
        if row is not None:
            _check_recorded(row, part, actual)
        # mkstemp lets only the owner read; other users of a shared cache may, as torch.hub does.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _copy(url: str, file: Any) -> str:
    """Write what an address holds to a file; returns its SHA-256."""
    sha256, received = hashlib.sha256(), 0
    try:
        request = Request(url, headers={"User-Agent": "vitlinear"})
        with urlopen(request, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            while chunk := response.read(CHUNK):
                file.write(chunk)
                sha256.update(chunk)
                received += len(chunk)
    except HTTPError as error:
        raise DownloadError(f"cannot download {url}: HTTP {error.code} {error.reason}") from error
    except URLError as error:
        raise DownloadError(f"cannot download {url}: {error.reason}") from error
    except (OSError, ValueError, HTTPException) as error:  # the last: a chunk broke off
        raise DownloadError(f"cannot download {url}: {one_line(error)}") from error
    # http.client gives what came and says nothing when a connection ends early.
    if length is not None and received != int(length):
        raise DownloadError(
            f"the download of {url} broke off after {received} of {length} bytes; try again"
        )
    return sha256.hexdigest()


def _check_recorded(row: PublishedFile, path: Path, sha256: str | None) -> None:
    """Compare a whole file with what `PUBLISHED` says of it.

    Raises:
        DownloadError: It is another file.
    """
    size = path.stat().st_size
    if row.size is not None and size != row.size:
        found, expected = f"has {size} bytes", f"{row.size}"
    elif row.sha256 and sha256 and not sha256.startswith(row.sha256):
        found, expected = f"has SHA-256 {sha256}", f"{row.sha256}..."
    else:
        return
    raise DownloadError(
        f"{row.location} {found}, not {expected}: it is not the file that this version of "
        "vitlinear knows; if its authors have replaced it and you trust it, download it and give "
        "it with pretrained_cfg_overlay=dict(file=...)"
    )
