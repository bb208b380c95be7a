"""Train a detector: the same as `vitlinear train-detector`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["train-detector", *sys.argv[1:]]))
