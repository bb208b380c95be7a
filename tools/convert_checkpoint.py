"""Convert a checkpoint of the authors' code to safetensors: the same as `vitlinear convert`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
