"""Evaluate a segmentor: the same as `vitlinear test-segmentor`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["test-segmentor", *sys.argv[1:]]))
