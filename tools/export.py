"""Export a model to ONNX, torch.export or safetensors: the same as `vitlinear export`."""

import sys

from vitlinear_cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
