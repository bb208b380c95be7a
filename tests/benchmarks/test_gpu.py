"""The rows of the GPU benchmark are calls of the models that they name; its verdict on a row."""

from typing import Any

import pytest
import timm
import torch

from benchmarks import gpu, gpu_rows
from vitlinear.report import attention_calls


@pytest.mark.slow
def test_rows_have_the_sizes_of_their_models() -> None:
    found = set()
    named = [(shape.where.split(maxsplit=1)[0], shape) for shape in gpu_rows.SHAPES]
    named = [(name, shape) for name, shape in named if timm.is_model(name)]
    for name in dict.fromkeys(name for name, _ in named):
        with torch.device("meta"):
            model = timm.create_model(name)
        for call in attention_calls(model, (64, 3, 224, 224)):
            if call.work is not None:
                found.add((name, call.work.mechanism, *call.shape))
    for name, shape in named:
        size = (shape.batch, shape.length, shape.heads, shape.dim)
        assert (name, shape.mechanism, *size) in found, shape
    assert len(named) > 20


def test_verdict() -> None:
    large = gpu_rows.Shape("large", "mala", 8, 128, 128, 4, 64)
    small = gpu_rows.Shape("small", "mala", 64, 14, 14, 4, 64)
    bandwidth = large.tensor_bytes / 1e-3  # a tensor a millisecond

    def row(shape: gpu_rows.Shape, name: str, forward: float, backward: float) -> dict[str, Any]:
        both = forward + backward
        times = {"forward_ms": [forward], "backward_ms": [backward], "both_ms": [both]}
        made = {**shape._asdict(), "length": shape.length, "implementation": name, **times}
        gpu.add_shares(made, shape, bandwidth)
        return made

    # Four tensors forward and seven backward: 80 % and 64 %, 16 ms in all
    rows = [row(large, "triton", 5, 7 / 0.64), row(small, "triton", 1, 1)]
    gpu.add_aims(rows)
    assert rows[0]["aims"] == {"forward": True, "backward": False} and not rows[1]["aims"]
    rows += [
        row(large, gpu_rows.COMPILED, 20, 20),
        row(large, "transcription", 40, 50),
        row(large, "SDPA flash_attention", 50, 50),
        row(small, gpu_rows.COMPILED, 2, 3),
        row(small, "SDPA flash_attention", 0.5, 0.5),
        {**small._asdict(), "length": small.length, "implementation": "eager", "error": "skipped"},
    ]
    gpu.add_aims(rows)
    lines = [line.split("  ")[-1].strip() for line in gpu.table(rows).splitlines()]
    assert lines[:3] == ["aims", "misses backward, transcription", "meets compiled"]
    assert not any(word in line for line in lines[3:] for word in ("meets", "misses"))
    rows.append(row(large, "SDPA cudnn_attention", 5, 5))
    gpu.add_aims(rows)
    assert gpu.verdict(rows[0]["aims"]) == "misses backward, transcription, SDPA"
