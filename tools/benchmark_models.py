"""Speed and memory of any timm models, side by side; see benchmarks/accounts/whole-models.md.

python tools/benchmark_models.py ravlt_s swin_tiny_patch4_window7_224 --modes eager fused
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

from benchmarks.models import main  # noqa: E402
from vitlinear_cli import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(main))
