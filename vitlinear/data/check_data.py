"""The ``check-data`` command: reads both splits of a data set once and reports what is in them."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitlinear.cli.flags import COUNT, from_arguments
from vitlinear.cli.parser import Parser
from vitlinear.files import check_no_input, check_parent, write_text

from .dataset import ONE_CLASS, DataConfig, add_data_flags, open_source, source_options
from .images import is_deep
from .listing import told_left_out
from .probe import Record, probe

PERCENTILES = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}
# Kinds of oddity: what models are seldom meant to see, or what happens to it is easily overlooked.
ODD = {
    "cmyk": "CMYK or another mode of print",
    "deep": "grey with more than 8 bits: integers are read as 0 to 65535, floats as 0 to 1",
    "outside": "with values outside of that: read from their own least to their own greatest value",
    "dark": "with values in a 16th of that: they become nearly black",
    "transparent": "with transparent pixels: put on white, unless models get alpha",
    "rotated": "turned or mirrored by their EXIF tag",
    "frames": "with several frames or pages: the first is read",
    "tiny": "shorter side under a quarter of the median",
    "elongated": "one side more than 4 times the other",
}
SHOWN = 10  # names per finding in the text; the JSON file has all


@dataclass(frozen=True)
class CheckDataConfig:
    """The data set that ``check-data`` reads, and the file that it writes."""

    data: DataConfig
    train_split: str
    num_classes: int | None
    json: str | None


def parse_arguments(
    argv: Sequence[str] | None, prog: str = "vitlinear check-data"
) -> CheckDataConfig:
    """Parses flags."""
    parser = Parser(
        prog=prog,
        description="Read a data set once, every image of both splits, and report unreadable and "
        "odd ones, class counts, sizes, and files that are in both splits. The exit status is 1 "
        "if anything is unreadable. It takes the same flags as `vitlinear train`.",
    )
    add_data_flags(parser)
    group = parser.group("check")
    group.add_argument("--train-split", default="train", metavar="NAME")
    group.add_argument("--num-classes", type=COUNT, default=None, metavar="N")
    group.add_argument("--json", default=None, metavar="FILE", help="everything found, as JSON")
    return from_arguments(CheckDataConfig, parser.parse_args(argv))


def main(argv: Sequence[str] | None, prog: str = "vitlinear check-data") -> None:
    """Runs the command."""
    config = parse_arguments(argv, prog)
    check_parent(config.json, (config.data.data_dir,))
    report = check_data(config)
    print("\n".join(_text(report)))
    if config.json:
        write_text(Path(config.json).expanduser(), json.dumps(report, indent=2) + "\n")
    if any(split["unreadable"] for split in report["splits"].values()):
        sys.exit(1)


def check_data(config: CheckDataConfig) -> dict[str, Any]:
    """Reads both splits of a data set, or the one of a file.

    Returns:
        ``splits``, by name what `describe` says; ``in_both``, pairs of names of held-out and
        training images with the same content; ``classes_differ``, the names that only one split
        has; ``classes_in_one_split``, the classes that have images in one split only.
    """
    data, train_split = config.data, config.train_split
    names = ("held-out",) if _is_file(data.data_dir) else ("training", "held-out")
    # All are opened before the first is read: mistakes come first.
    sources = {name: _open(data, train_split, name == "training") for name in names}
    splits, records = {}, {}
    if config.json and Path(config.json).expanduser().exists():  # else it is no image
        for source in sources.values():
            if hasattr(source, "name"):
                check_no_input(config.json, map(source.name, range(len(source))))
    for name, source in sources.items():
        records[name] = list(probe(source, data.workers, name))
        classes = getattr(source, "classes", None)
        splits[name] = describe(records[name], classes, config.num_classes)
        splits[name]["left_out"] = dict(getattr(source, "left_out", {}))
    report: dict[str, Any] = {"splits": splits, "in_both": []}
    if len(splits) == 2:
        report["in_both"] = _in_both(records["training"], records["held-out"])
        first, second = (splits[name] for name in names)
        found = [{entry["class"] for entry in split["classes"]} for split in (first, second)]
        report["classes_differ"] = sorted(found[0] ^ found[1])
        used = [
            {entry["class"] for entry in split["classes"] if entry["images"]}
            for split in (first, second)
        ]
        report["classes_in_one_split"] = sorted(used[0] ^ used[1])
    return report


def _is_file(path: str | None) -> bool:
    return path is not None and Path(path).expanduser().is_file()


def _open(data: DataConfig, train_split: str, train: bool) -> Any:
    options = source_options(data, train_split if train else data.val_split)
    # Not for training: that would shuffle streams, and repeat some images to fill batches.
    return open_source(data.dataset, train=train, mode="RGB", is_training=False, **options)


def describe(
    records: Sequence[Record], classes: Sequence[str] | None, num_classes: int | None = None
) -> dict[str, Any]:
    """Summarises the records of one split.

    Args:
        records: Of every image.
        classes: Names by label, or None.
        num_classes: Their number where the names are not known.

    Returns:
        ``images``; ``unreadable``, a list of ``name`` and ``reason``; ``classes``, a list of
        ``class`` and ``images``; ``class_counts`` with ``min``, ``median``, ``max``, ``empty`` and
        ``imbalance`` (largest over smallest that is not empty); ``width``, ``height`` (pixels) and
        ``file_bytes`` with `PERCENTILES`; ``modes`` and ``formats``, counts by name; ``odd``, names
        by the kinds of `ODD`; ``repeated``, the number of images whose content came before;
        ``ambiguous``, the number of contents that are in several classes.
    """
    labels = [record.label for record in records if record.label is not None]
    count = len(classes) if classes else num_classes or max(labels, default=-1) + 1
    unreadable = [
        {"name": record.name, "reason": record.error} for record in records if record.error
    ]
    for record in records:
        if record.label is not None and not 0 <= record.label < count:
            why = f"the label {record.label} is none of {count} classes"
            unreadable.append({"name": record.name, "reason": why})
    counts = np.bincount([label for label in labels if 0 <= label < count], minlength=count)
    filled = counts[counts > 0]
    whole = [record for record in records if not record.error]
    return {
        "images": len(records),
        "unreadable": unreadable,
        "classes": [
            {"class": str(classes[label]) if classes else str(label), "images": int(number)}
            for label, number in enumerate(counts)
        ],
        "class_counts": {
            "min": int(counts.min(initial=len(records))),
            "median": float(np.median(counts)) if count else 0.0,
            "max": int(counts.max(initial=0)),
            "empty": int((counts == 0).sum()),
            "imbalance": float(filled.max() / filled.min()) if len(filled) else None,
        },
        "width": _percentiles(record.size[0] for record in whole),
        "height": _percentiles(record.size[1] for record in whole),
        "file_bytes": _percentiles(
            record.content_bytes for record in whole if record.content_bytes is not None
        ),
        "modes": dict(Counter(record.mode for record in whole).most_common()),
        "formats": dict(Counter(record.format for record in whole if record.format).most_common()),
        "odd": _odd(whole),
        **_repeated(whole),
    }


def _percentiles(values: Iterable[int]) -> dict[str, float] | None:
    array = np.fromiter(values, dtype=np.int64)
    if not len(array):
        return None
    return {name: float(np.percentile(array, part)) for name, part in PERCENTILES.items()}


def _odd(records: Sequence[Record]) -> dict[str, list[str]]:
    median = np.median([min(record.size) for record in records]) if records else 0
    odd: dict[str, list[str]] = {}
    for record in records:
        short, long = sorted(record.size)
        kinds = {
            "cmyk": record.mode in ("CMYK", "YCbCr", "LAB", "HSV"),
            "deep": is_deep(record.mode),
            "outside": record.depth is not None and record.depth.outside,
            "dark": record.depth is not None and record.depth.dark,
            "transparent": record.transparent,
            "rotated": record.orientation != 1,
            "frames": record.frames,
            "tiny": short < median / 4,
            "elongated": long > 4 * short,
        }
        for kind, applies in kinds.items():
            if applies:
                odd.setdefault(kind, []).append(record.name)
    return odd


def _repeated(records: Sequence[Record]) -> dict[str, int]:
    labels: dict[int, int | None] = {}
    ambiguous = set()
    for record in records:
        if labels.setdefault(record.digest, record.label) != record.label:
            ambiguous.add(record.digest)
    return {"repeated": len(records) - len(labels), "ambiguous": len(ambiguous)}


def _in_both(training: Sequence[Record], held_out: Sequence[Record]) -> list[list[str]]:
    known = {record.digest: record.name for record in reversed(training) if not record.error}
    return [
        [record.name, known[record.digest]]
        for record in held_out
        if not record.error and record.digest in known
    ]


def _text(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, split in report["splits"].items():
        counts, unreadable = split["class_counts"], split["unreadable"]
        lines += [f"{name}: {split['images']} images, {len(unreadable)} unreadable"]
        lines += _shown([f"{entry['name']}: {entry['reason']}" for entry in unreadable])
        if told := told_left_out(Counter(split["left_out"])):
            lines += [f"  {told}"]
        lines += [_classes(split["classes"], counts)]
        if name == "training" and sum(entry["images"] > 0 for entry in split["classes"]) == 1:
            lines += [f"  {ONE_CLASS}"]
        for key in ("width", "height", "file_bytes"):
            if split[key]:
                shown = ", ".join(f"{part} {value:.0f}" for part, value in split[key].items())
                lines += [f"  {key.replace('_', ' ')}: {shown}"]
        for key in ("modes", "formats"):
            if split[key]:
                shown = ", ".join(f"{part} {number}" for part, number in split[key].items())
                lines += [f"  {key}: {shown}"]
        for kind, names in split["odd"].items():
            lines += [f"  {len(names)} {ODD[kind]}", *_shown(names)]
        if split["repeated"]:
            lines += [f"  {split['repeated']} repeat the content of another"]
        if split["ambiguous"]:
            lines += [f"  {split['ambiguous']} contents are in several classes"]
    if report["in_both"]:
        lines += [f"{len(report['in_both'])} held-out images are also in the training split"]
        lines += _shown([" = ".join(pair) for pair in report["in_both"]])
    if report.get("classes_differ"):
        lines += [f"classes that only one split has: {_few(report['classes_differ'])}"]
    elif report.get("classes_in_one_split"):
        lines += [f"classes with images in one split only: {_few(report['classes_in_one_split'])}"]
    return lines


def _classes(classes: list[dict[str, Any]], counts: dict[str, Any]) -> str:
    line = f"  {len(classes)} classes; images per class: min {counts['min']}, "
    line += f"median {counts['median']:g}, max {counts['max']}"
    if counts["imbalance"] is not None and counts["imbalance"] > 1:
        line += f", largest / smallest {counts['imbalance']:.1f}"
    if counts["empty"]:
        empty = [entry["class"] for entry in classes if not entry["images"]]
        line += f"; {counts['empty']} empty: {_few(empty)}"
    return line


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _shown(names: list[str]) -> list[str]:
    lines = [f"    {name}" for name in names[:SHOWN]]
    more = len(names) - SHOWN
    return lines + ([f"    ... and {more} more; --json FILE lists all"] if more > 0 else [])
