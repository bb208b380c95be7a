"""Train a classifier: the same as `vitlinear train`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
