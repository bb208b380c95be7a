"""Measure a checkpoint or model: the same as `vitlinear validate`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
