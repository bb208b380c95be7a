"""Turn the aerial photographs that the package deepforest ships into a COCO-format data set.

pip download --no-deps deepforest
python tools/deepforest_to_coco.py deepforest-*.whl data/deepforest
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vitlinear.cli.flags import COUNT
from vitlinear.dense import deepforest
from vitlinear_cli import run


def main(argv: Sequence[str]) -> None:
    """Converts and says how much there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the wheel, or a folder like its deepforest/data")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--tile", type=COUNT, default=400, help="largest side, in pixels")
    held_out = {"nargs": "+", "default": deepforest.HELD_OUT, "metavar": "NAME"}
    parser.add_argument("--held-out", **held_out, help="pictures for val, without suffix")
    parser.add_argument("--keep-labels", action="store_true", help="not one category `tree`")
    args = parser.parse_args(argv)
    category = None if args.keep_labels else "tree"
    counts = deepforest.convert(args.source, args.output, args.tile, args.held_out, category)
    for split in ("train", "val"):
        print(f"{split}: {counts[f'{split}_images']} tiles, {counts[f'{split}_boxes']} boxes")


if __name__ == "__main__":
    sys.exit(run(main))
