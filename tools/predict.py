"""Classify image files, or find what is on them: the same as `vitlinear predict`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
