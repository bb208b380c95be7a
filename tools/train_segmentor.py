"""Train a segmentor: the same as `vitlinear train-segmentor`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["train-segmentor", *sys.argv[1:]]))
