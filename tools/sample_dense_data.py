"""Write a small data set for detection and segmentation, of scikit-image's photographs.

python tools/sample_dense_data.py            # data/sample/coco and data/sample/ade
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vitlinear.dense import ade, coco
from vitlinear_cli import run


def main(argv: Sequence[str]) -> None:
    """Writes both layouts below a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/sample"))
    folder = parser.parse_args(argv).folder
    with coco.new_folder(folder) as new:
        coco.write_sample(new / "coco")
        ade.write_sample(new / "ade")
    print(f"{folder / 'coco'}\n{folder / 'ade'}")


if __name__ == "__main__":
    sys.exit(run(main))
