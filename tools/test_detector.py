"""Evaluate a detector: the same as `vitlinear test-detector`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["test-detector", *sys.argv[1:]]))
