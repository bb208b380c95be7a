"""Annotations against the model of a config: counted and compared before anything is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mmcv
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import broadcast_object_list
from mmengine.registry import DATASETS, init_default_scope
from timm.utils import is_distributed_env
from timm.utils.distributed import world_info_from_env

from vitlinear.errors import LostPeerError, UserError, one_line
from vitlinear.files import write_text

from ..instances import Instances, check_categories, check_instances, count_instances
from ..label_maps import LabelMaps, check_labels, count_labels
from .checks import sections

Counted = TypeVar("Counted", Instances, LabelMaps)
SLOW = 3.0  # seconds that counting takes before it is remembered
# Heads that count other things than the classes of the data set.
OTHER_HEADS = ("backbone", "rpn_head", "semantic")


def check_annotations_once(
    config: Config, parts: Sequence[str], framework: str
) -> Callable[[], None]:
    """Count and refuse annotations as `check_annotations` does, in the first of several processes.

    Args:
        config: The whole, with its launcher.
        parts: As `check_annotations`, like the rest.
        framework: Where the config names no scope.

    Returns:
        What every process calls once they have joined: there all raise what the first one found,
        or those that it left would wait for it until their time is up.

    Raises:
        UserError: As `check_annotations`, where there are no others.
    """
    if config.get("launcher", "none") == "none" or not is_distributed_env():
        check_annotations(config, parts, framework)
        return lambda: None
    failure: Exception | None = None
    if world_info_from_env()[1] == 0:
        try:
            check_annotations(config, parts, framework)
        except Exception as error:
            failure = error

    def tell() -> None:
        told = [None if failure is None else one_line(failure)]
        broadcast_object_list(told)
        if failure is not None:
            raise failure
        if told[0] is not None:
            raise LostPeerError(f"process 0 failed: {told[0]}")

    return tell


def check_annotations(config: Config, parts: Sequence[str], framework: str) -> None:
    """Count the annotations that a config uses, print the counts, and refuse what cannot be meant.

    Data sets of other kinds than mmdet's of COCO and mmseg's are left alone.

    Args:
        config: The whole.
        parts: What is going to be used, out of ``train``, ``val`` and ``test``.
        framework: ``mmdet`` or ``mmseg``, where the config names no scope.

    Raises:
        UserError: Names, their order or number, or values of the annotations do not fit.
    """
    scope = config.get("default_scope", framework)
    told: set[str] = set()
    for part in parts:
        key = f"{part}_dataloader"
        for where, section in sections(config.get(key), key):
            kind = kind_of_data(section, scope)
            if kind is None:
                continue
            classes = _classes(kind, section, where)
            if classes is not None:
                check_heads(config, classes, where)
                line = _check(config, part, kind, section, where, classes)
                if line and line not in told:
                    told.add(line)
                    print(line)


def kind_of_data(section: Mapping[str, Any], scope: str) -> type[Any] | None:
    """The class of a data set that a section of a config names; None if it names none.

    Args:
        section: With ``type``.
        scope: ``mmdet`` or ``mmseg``, where the name of the class has no scope.
    """
    if not isinstance(section.get("type"), str):
        return None
    init_default_scope(scope)
    with DATASETS.switch_scope_and_registry(scope) as registry:
        kind = registry.get(section["type"])
    return kind if isinstance(kind, type) and issubclass(kind, BaseDataset) else None


def _classes(kind: type[Any], section: Mapping[str, Any], where: str) -> list[str] | None:
    """Names of the classes: the config's, or else those that the kind of data set has."""
    classes = kind._load_metainfo(section.get("metainfo")).get("classes")
    if isinstance(classes, str):
        raise UserError(
            f"{where}.metainfo.classes is the text {classes!r}: write a tuple, ({classes!r},), or "
            "the path of a file with a name a line"
        )
    return None if classes is None else [str(name) for name in classes]


def check_heads(config: Config, classes: Sequence[str], where: str) -> None:
    """Refuse a model that has another number of classes than there are names.

    Args:
        config: With the model.
        classes: The names.
        where: What has them, for the message.

    Raises:
        UserError: A head of the model has another number.
    """
    model = config.get("model", {})
    if "language_model" in model:  # its classes are words of a text
        return
    for key, section in sections(model, "model"):
        number = section.get("num_classes")
        if number in (None, len(classes)) or any(part in key for part in OTHER_HEADS):
            continue
        raise UserError(
            f"{key}.num_classes is {number}, and {where} has {len(classes)} classes: set one or "
            "the other, in the config or with --cfg-options"
        )


def _check(
    config: Config,
    part: str,
    kind: type[Any],
    section: Mapping[str, Any],
    where: str,
    classes: Sequence[str],
) -> str | None:
    if _is(kind, "mmdet.datasets", "CocoDataset"):
        return _check_coco(config, part, section, where, classes)
    if _is(kind, "mmseg.datasets", "BaseSegDataset"):
        return _check_maps(part, kind, section, where, classes)
    return None


def _is(kind: type[Any], module: str, name: str) -> bool:
    """Whether a data set is of that class, or of one that reads its annotations likewise."""
    own = next((base for base in kind.__mro__ if base.__name__ == name), None)
    if own is None or not own.__module__.startswith(module):
        return False
    methods = ("load_data_list", "parse_data_info", "filter_data")
    return all(getattr(kind, method) is getattr(own, method) for method in methods)


def _check_coco(
    config: Config, part: str, section: Mapping[str, Any], where: str, classes: Sequence[str]
) -> str | None:
    evaluators = [
        inner for _, inner in sections(config.get(f"{part}_evaluator"), "") if part != "train"
    ]
    for evaluator in evaluators:
        path = evaluator.get("ann_file")
        if str(evaluator.get("type")).endswith("CocoMetric") and path and Path(path).is_file():
            counted = _remember([path], Instances, lambda path=path: count_instances(Path(path)))
            check_categories(counted.categories, classes, Path(path), f"{where}.metainfo.classes")
    place = str(section.get("ann_file") or "")
    path = Path(section.get("data_root") or "", place)
    if not place or "://" in place or not path.is_file():
        return None
    found = _remember([path], Instances, lambda: count_instances(path))
    names = f"{where}.metainfo.classes"
    if any(evaluator.get("format_only") for evaluator in evaluators):  # nothing is scored
        check_categories(found.categories, classes, path, names)
        return None
    masks = part == "train" and any(
        step.get("with_mask") for step in section.get("pipeline", ()) if isinstance(step, Mapping)
    )
    return check_instances(found, classes, path, names, masks)


def _check_maps(
    part: str, kind: type[Any], section: Mapping[str, Any], where: str, classes: Sequence[str]
) -> str | None:
    steps = [step for step in section.get("pipeline", ()) if isinstance(step, Mapping)]
    loaders = [step for step in steps if str(step.get("type")).endswith("LoadAnnotations")]
    if not loaders or section.get("backend_args"):
        return None
    arguments = {key: value for key, value in section.items() if key != "type"}
    dataset = kind(**{**arguments, "pipeline": [], "lazy_init": True})
    items = dataset.load_data_list()
    pairs = [(item["img_path"], item["seg_map_path"]) for item in items if "seg_map_path" in item]
    if not items:
        places = section.get("data_prefix", {}).get("img_path")
        raise UserError(
            f"{where} has no images: none in {Path(section.get('data_root') or '', places or '')} "
            f"is called *{dataset.img_suffix}; set {where}.data_prefix or .img_suffix"
        )
    if not pairs or any("://" in path for pair in pairs for path in pair):
        return None
    reduce = bool(dataset.reduce_zero_label)
    for step in loaders:
        if step.get("reduce_zero_label") not in (None, reduce):
            raise UserError(
                f"{where} has reduce_zero_label={reduce}, and its LoadAnnotations "
                f"{step['reduce_zero_label']}: they must say the same"
            )
    backend = loaders[0].get("imdecode_backend", "pillow")

    def count() -> LabelMaps:
        return count_labels(
            pairs, lambda data: mmcv.imfrombytes(data, flag="unchanged", backend=backend)
        )

    found = _remember([path for pair in pairs for path in pair], LabelMaps, count)
    return check_labels(found, classes, where, reduce, dataset.label_map, part == "train")


def _remember(
    paths: Iterable[str | Path], kind: type[Counted], count: Callable[[], Counted]
) -> Counted:
    """Counts of files: those of before, as long as the files are the same."""
    stats = [(str(path), os.stat(path)) for path in paths if os.path.exists(path)]
    identity = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    name = hashlib.sha256(json.dumps([kind.__name__, identity]).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vitlinear"
    path = cache / "annotations" / f"{name[:32]}.json"
    try:
        return _restored(kind, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    start = time.monotonic()
    counted = count()
    if time.monotonic() - start > SLOW:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(dataclasses.asdict(counted)))
        except (OSError, UserError) as error:  # then it is counted again the next time
            print(f"the counts of the annotations are not kept: {error}")
    return counted


def _restored(kind: type[Counted], values: dict[str, Any]) -> Counted:
    if kind is LabelMaps:  # JSON's keys are text
        for key in ("pixels", "example"):
            values[key] = {int(value): entry for value, entry in values[key].items()}
    return kind(**values)
