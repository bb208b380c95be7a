"""Files that mmengine reads, led through our reader: nothing in them is run.

mmengine's own loader reads a checkpoint that asks for code a second time, and runs it. Configs are
programs, and stay so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from mmengine.fileio.handlers import PickleHandler, YamlHandler, file_handlers
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as loading

from vitlinear.checkpoints.download import DownloadError, ensure_downloaded
from vitlinear.checkpoints.read import CheckpointError, LossHistory, read_checkpoint, read_pickle
from vitlinear.errors import one_line

# In C where PyYAML has it: to find a config of mmdet's, mmengine reads 200 files.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# torch's own net: it holds for whatever reads a file without asking mmengine, and in data workers.
TORCH_NET = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}


@contextlib.contextmanager
def safe_reading() -> Iterator[None]:
    """Let mmengine, mmdet and mmseg read files inside without running code from them.

    Those are checkpoints wherever they lie (``load_from``, ``resume``, ``init_cfg``, teachers, the
    files that model zoos name), and annotations in pickles and YAML. For what they read:

    Raises:
        CheckpointError: A file is missing or damaged, or would run code.
    """
    handlers = {"pkl": _Pickle(), "pickle": _Pickle(), "yaml": _Yaml(), "yml": _Yaml()}
    with (
        mock.patch.dict(loading.CheckpointLoader._schemes, {"": _local_backend}),
        mock.patch.object(loading, "load_url", _load_url),  # of web addresses and of model zoos
        mock.patch.object(loading, "_safe_torch_load", _load_any, create=True),  # of all the others
        mock.patch.dict(file_handlers, handlers),
        mock.patch.dict(os.environ, TORCH_NET),
    ):
        yield


def read_for_mmengine(path: str | Path) -> dict[str, Any]:
    """A checkpoint as mmengine's runner goes on from it.

    The config that it holds is left out: the runner would run it, to look for GPUs in it. Histories
    of losses are mmengine's again.

    Raises:
        CheckpointError: The file is missing or damaged, or would run code.
    """
    content = dict(read_checkpoint(Path(path).expanduser(), mmap=False))
    if isinstance(meta := content.get("meta"), Mapping):
        content["meta"] = {key: value for key, value in meta.items() if key != "config"}
    hub = content.get("message_hub")
    if isinstance(hub, Mapping) and isinstance(hub.get("log_scalars"), Mapping):
        scalars = {key: _history(value) for key, value in hub["log_scalars"].items()}
        content["message_hub"] = {**hub, "log_scalars": scalars}
    return content


def fetch(url: str, folder: str | None = None) -> Path:
    """The file of an address, which is fetched if it is not there.

    Args:
        url: The address, of http or https.
        folder: Where it is kept; None for torch's.

    Raises:
        CheckpointError: It cannot be had.
    """
    try:
        path = ensure_downloaded({"url": url}, folder)
    except DownloadError as error:
        raise CheckpointError(str(error)) from error
    assert path is not None  # an address always leads to a file, or to an error
    return path


def _history(value: Any) -> Any:
    if not isinstance(value, LossHistory):
        return value
    return HistoryBuffer(value.values, value.counts)


# mmengine logs what a loader is called, from the eleventh letter on.
def _local_backend(path: str, map_location: Any = None) -> dict[str, Any]:
    return read_for_mmengine(path)


def _load_any(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    if not isinstance(file, str | os.PathLike):
        raise CheckpointError(
            "checkpoints in object stores cannot be read: fetch the file, and give its path"
        )
    return read_for_mmengine(file)


def _load_url(url: str, model_dir: str | None = None, **kwargs: Any) -> dict[str, Any]:
    return read_for_mmengine(fetch(url, model_dir))


class _Pickle(PickleHandler):
    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        return read_pickle(file, "a pickle that the config names", **kwargs)


class _Yaml(YamlHandler):
    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        try:
            return yaml.load(file, Loader=YAML_LOADER)
        except yaml.YAMLError as error:
            raise CheckpointError(
                f"a YAML file that the config names cannot be read: {one_line(error)}"
            ) from error
