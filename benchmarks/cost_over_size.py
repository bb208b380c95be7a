"""Draws README's figure: the cost of one image against the side of the image.

    python benchmarks/cost_over_size.py    # writes benchmarks/results/cost_over_size.svg

Left: multiply-adds, counted on the meta device. Right: seconds, from committed result files that
`tools/benchmark_models.py` wrote on one machine. Nothing is measured here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.subject import build, multiply_adds  # noqa: E402 - after the path
from vitlinear.files import write_atomically  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FILES = ("models_cpu_sizes.json", "models_cpu_2048.json")
MODE = "fused"
SIDES = (224, 512, 768, 1024, 1536, 2048)
# Model, its name in the figure, colour.
MODELS = (
    ("deit_small_patch16_224", "DeiT-S: softmax over all tokens", "#c23b22"),
    ("swin_tiny_patch4_window7_224", "Swin-T: softmax in windows", "#777777"),
    ("ravlt_s_linear", "ravlt_s_linear: linear over all tokens", "#1f5fa8"),
)


def counted(model: str) -> list[tuple[int, float]]:
    """Sides in pixels, and 10^9 multiply-adds of one square image."""
    sizes = [(side, (3, side, side)) for side in SIDES]
    return [(side, multiply_adds(build(model, size), size) / 1e9) for side, size in sizes]


def measured(model: str) -> list[tuple[int, float]]:
    """Sides in pixels, and seconds of one square image; of two files the later one counts."""
    seconds: dict[int, float] = {}
    for name in FILES:
        for row in json.loads((RESULTS / name).read_text())["rows"]:
            if row["model"] == model and row["mode"] == MODE and row["batch"] == 1:
                seconds[row["height"]] = row["p50_ms"] / 1000
    return sorted(seconds.items())


def main() -> None:
    """Writes the figure."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "vitlinear", "svg.fonttype": "none"})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.patch.set_facecolor("white")  # readable on dark pages too
    panels = figure.subplots(1, 2)
    for axes, points_of, title in (
        (panels[0], counted, "10⁹ multiply-adds of one image, counted"),
        (panels[1], measured, "seconds for one image, measured on a CPU"),
    ):
        for model, label, colour in MODELS:
            points = points_of(model)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4)
            print(title, model, points)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("side of the image, pixels")
        axes.set_xticks([512, 1024, 1536, 2048])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small", frameon=False)
    write_atomically(
        RESULTS / "cost_over_size.svg",
        lambda path: figure.savefig(path, format="svg", metadata={"Date": None}),
    )


if __name__ == "__main__":
    main()
