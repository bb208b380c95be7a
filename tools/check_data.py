"""Read a data set once and report what is in it: the same as `vitlinear check-data`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["check-data", *sys.argv[1:]]))
