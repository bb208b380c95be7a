"""``python -m vitlinear``, which is the ``vitlinear`` command."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main())
