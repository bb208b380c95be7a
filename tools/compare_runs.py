"""Plot and tabulate several runs: the same as `vitlinear compare-runs`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["compare-runs", *sys.argv[1:]]))
