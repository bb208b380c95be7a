"""Count detectors and segmentors, and write the tables of configs/{detection,segmentation}.

Parameters and multiply-adds of every configuration stand in the README of its folder beside what
is published of it (published.yaml there). Models are made without memory, so that all of them take
a few minutes and any can be counted.

    python tools/count_dense.py            # count all, write the tables
    python tools/count_dense.py --check    # write nothing; exit 1 if a table is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONFIGS = ROOT / "configs"
# What is counted: which configurations, height and width of the image, figures of a table's rows.
NAMES = {"detection": "*_coco.py", "segmentation": "*_ade20k-*.py"}
SIZES = {"detection": (800, 1280), "segmentation": (512, 2048)}
RESULTS = {"detection": ("box_ap", "mask_ap"), "segmentation": ("miou",)}
PROPOSALS = {"bbox_head": (1000, 7), "mask_head": (100, 14)}  # how many, side of their features
PROJECTIONS = {"convolution", "addmm", "mm"}
BEGIN, END = "<!-- tools/count_dense.py -->", "<!-- end -->"


@dataclasses.dataclass(frozen=True)
class Count:
    """Size and cost of a model.

    Attributes:
        params: Parameters.
        projections: Multiply-adds of convolutions and linear layers, for one image.
        attention: Multiply-adds of the matrix products of attention, for one image.
    """

    params: int
    projections: int
    attention: int


class Inference(nn.Module):
    """The counted part of a detector or segmentor, as the tools of mmdet 2 and mmseg 0 count.

    Backbone and neck; the head of a detector of one stage or the region proposals; each box head
    for 1000 proposals and each mask head for 100, whatever their number would be; of a segmentor
    the decoding head, but not the auxiliary one. Proposals and pooling cost nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Any]:
        """[1, 3, H, W] -> what the heads give."""
        model: Any = self.model
        maps = model.extract_feat(images)
        if hasattr(model, "decode_head"):
            return [model.decode_head(maps)]
        if not hasattr(model, "roi_head"):
            return [model.bbox_head(maps)]
        outputs = [model.rpn_head(maps)]
        for name, (number, side) in PROPOSALS.items():
            heads = getattr(model.roi_head, name)
            regions = images.new_zeros(number, maps[0].shape[1], side, side)
            outputs += [
                head(regions) for head in (heads if isinstance(heads, nn.ModuleList) else [heads])
            ]
        return outputs


def config_paths(folder: str) -> list[Path]:
    """The configurations of ``detection`` or ``segmentation`` on COCO or ADE20K."""
    return sorted(CONFIGS.joinpath(folder).glob(NAMES[folder]))


def build(config: Any) -> Any:
    """The model of a config, a `mmengine.Config`; its backbone without published weights."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    from vitlinear.dense.openmmlab import require

    require(f"{config.default_scope}.models")
    init_default_scope(config.default_scope)
    settings = config.model.copy()
    settings.backbone = {**settings.backbone, "pretrained": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Default ``avg_non_ignore``")
        return revert_sync_batchnorm(MODELS.build(settings))


def count(path: Path) -> Count:
    """Count the model of a config file."""
    from mmengine.config import Config

    with torch.device("meta"):
        model = build(Config.fromfile(path)).eval()
        images = torch.zeros(1, 3, *SIZES[path.parent.name])
    mode = FlopCounterMode(display=False)
    with torch.no_grad(), mode, torch.device("meta"):
        Inference(model)(images)
    projections = attention = 0
    for operator, flops in mode.get_flop_counts()["Global"].items():
        # The counter has two operations for each multiply-add.
        if str(operator).rpartition(".")[2] in PROJECTIONS:
            projections += flops // 2
        else:
            attention += flops // 2
    return Count(sum(p.numel() for p in model.parameters()), projections, attention)


def published(folder: str) -> dict[str, dict[str, Any]]:
    """Entries of published.yaml, by name of the config."""
    return yaml.safe_load(CONFIGS.joinpath(folder, "published.yaml").read_text(encoding="utf-8"))


def row(path: Path, counted: Count, facts: dict[str, Any]) -> str:
    """A line of the table."""
    results = [facts.get(name, "") for name in RESULTS[path.parent.name]]
    return (
        "| "
        + " | ".join(
            str(cell)
            for cell in (
                f"[{path.stem}]({path.name})",
                f"{counted.params / 1e6:.2f}",
                facts.get("params", ""),
                f"{counted.projections / 1e9:.1f}",
                facts.get("macs", ""),
                f"{(counted.projections + counted.attention) / 1e9:.1f}",
                *results,
                facts.get("source", ""),
            )
        )
        + " |"
    )


def table(folder: str) -> Iterator[str]:
    """The table of a folder, line by line."""
    height, width = SIZES[folder]
    results = {"box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU"}
    header = [
        "config",
        "params, M",
        "published",
        f"G at {width}x{height}",
        "published",
        "with attention's products",
        *(results[name] for name in RESULTS[folder]),
        "source",
    ]
    yield "| " + " | ".join(header) + " |"
    yield "| --- " * len(header) + "|"
    facts = published(folder)
    for path in config_paths(folder):
        yield row(path, count(path), facts.get(path.stem, {}))


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    stale = []
    for folder in SIZES:
        readme = CONFIGS / folder / "README.md"
        old = readme.read_text(encoding="utf-8")
        before, _, rest = old.partition(BEGIN)
        lines = []
        for line in table(folder):
            print(line, flush=True)
            lines.append(line)
        new = "\n".join([before + BEGIN, "", *lines, "", END]) + rest.partition(END)[2]
        if new != old:
            stale.append(str(readme.relative_to(ROOT)))
            if not args.check:
                readme.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'out of date' if args.check else 'wrote'}: {', '.join(stale)}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
