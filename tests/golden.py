"""Golden outputs of the released code: the weights and inputs they were made with.

The recipe is tests/data/golden/README.md.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitlinear import ops
from vitlinear.checkpoints import checkpoint_filter_fn

FOLDER = Path(__file__).parent / "data" / "golden"
BACKENDS = ("eager", "library")
SIZES = ((224, 224), (192, 256))  # of most stored logits

# Rules for the value of an entry, first that fits; n is standard normal, seeded by the key.
_RULES = (
    (lambda k, s: k.endswith("running_var"), lambda n, s: 1 + 0.25 * np.abs(n)),
    (lambda k, s: k.endswith("running_mean"), lambda n, s: 0.1 * n),
    (lambda k, s: k.endswith(("gamma_1", "gamma_2")), lambda n, s: 0.5 + 0.1 * n),
    (lambda k, s: k.endswith("temperature"), lambda n, s: 0.2 + 0.02 * n),
    (
        lambda k, s: (
            "pos_embed" in k.rpartition(".")[2]
            or k.endswith(("cls_token", "relative_position_bias_table"))
        ),
        lambda n, s: 0.1 * n,
    ),
    (lambda k, s: k.endswith("bias"), lambda n, s: 0.05 * n),
    (lambda k, s: len(s) >= 2, lambda n, s: n / np.sqrt(np.prod(s[1:]))),
    (lambda k, s: True, lambda n, s: 1 + 0.1 * n),
)

# ViT3, MLLA and PolaFormer have these before those above.
LATER_FAMILIES = ("vittt", "mlla", "polaformer")
_LATER_RULES = (
    (lambda k, s: _last(k) in ("w1", "w2"), lambda n, s: n / np.sqrt(s[-1])),
    (lambda k, s: _last(k) == "power", lambda n, s: n),
    (lambda k, s: _last(k) == "scale", lambda n, s: 0.5 + 0.1 * n),
    (lambda k, s: _last(k) == "positional_encoding", lambda n, s: 0.1 * n),
    (
        lambda k, s: k.endswith(("cpe.weight", "cpe1.weight", "cpe2.weight")),
        lambda n, s: 0.1 * n,
    ),
    *_RULES,
)
# What the released code computes from sizes: left as constructed, and never loaded by ours.
_COMPUTED = ("attn_mask", "rotations", "relative_position_index")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def weight(key: str, shape: list[int], family: str = "") -> Tensor:
    """Value of a floating-point entry, float64."""
    rules = _LATER_RULES if family in LATER_FAMILIES else _RULES
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    value = next(make for fits, make in rules if fits(key, shape))(n, shape)
    return torch.from_numpy(np.asarray(value))


def upstream_state_dict(entries: list[list[Any]], family: str = "") -> dict[str, Tensor]:
    """State dict with the authors' keys from a list of [key, shape, dtype]."""
    state_dict = {}
    for key, shape, dtype in entries:
        if key.endswith("RoPE.angle"):
            # As the released code makes it: each frequency twice, reciprocal taken in float32.
            steps = torch.linspace(0, 1, shape[0] // 2)
            state_dict[key] = (1.0 / 10000**steps).repeat_interleave(2)
        elif dtype != "float32" or key.endswith(_COMPUTED):
            state_dict[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
        else:
            state_dict[key] = weight(key, shape, family)
    return state_dict


def loaded(name: str, released: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of ours with weights in the authors' keys or in ours, in evaluation.

    Made without memory: random weights for a model of a whole size take a second.
    """
    model = timm.create_model(name, device="meta")
    weights = {
        key: value.to(dtype, copy=True) if value.is_floating_point() else value
        for key, value in checkpoint_filter_fn(released, model).items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval()


def giga_multiply_adds(name: str, size: int = 224, **options: Any) -> float:
    """Of a model of ours on one square image, in evaluation; made without memory.

    Args:
        name: Registered name.
        size: Side of the image.
        options: Of the model.
    """
    model = timm.create_model(name, device="meta", **options).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


def variants(family: str) -> dict[str, Any]:
    """Parameter counts and state-dict entries of a family's released variants."""
    return json.loads((FOLDER / f"{family}.json").read_text())


def outputs(family: str) -> dict[str, Tensor]:
    """All that is kept of a later family: logits, gradients of attention, maps, by name."""
    with np.load(FOLDER / f"{family}.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def attention_case(name: str, family: str = "") -> dict[str, Any]:
    """One attention module: its description, input, output gradient and what came out.

    Those of the later families also have ``grad_NAME`` for some parameters.
    """
    described = FOLDER / (f"{family}_attention.json" if family else "attention.json")
    case = json.loads(described.read_text())[name]
    random = np.random.RandomState(1)
    if case["layout"] == "nchw":
        shape: tuple[int, ...] = (2, case["C"], case["H"], case["W"])
    else:
        shape = (2, case["H"] * case["W"], case["C"])
    for key, value in outputs(family or "attention").items():
        if key.startswith(f"{name}/"):
            case[_last(key.replace("/", "."))] = value
    case["x"] = torch.from_numpy(random.standard_normal(shape)) * case.get("input_scale", 1)
    case["grad"] = torch.from_numpy(random.standard_normal(shape))
    case["weights"] = {key: weight(key, shape, family) for key, shape in case["state_dict"]}
    return case


def images(height: int, width: int) -> Tensor:
    """The two input images, float64."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, height, width)))


def family_of(name: str) -> str:
    """The later family that a released model is of; empty for one of the first."""
    return next((f for f in LATER_FAMILIES if _is_there(f) and name in variants(f)), "")


def _is_there(family: str) -> bool:
    return (FOLDER / f"{family}.json").exists()


def _logits_file(name: str) -> Path:
    return FOLDER / f"{family_of(name) or 'logits'}.npz"


def logit_sizes(name: str) -> list[tuple[int, int]]:
    """Sizes of the images that there are logits of a released model for."""
    with np.load(_logits_file(name)) as archive:
        keys = [key.split("/") for key in archive.files]
    sizes = [key[1].split("x") for key in keys if key[0] == name and len(key) == 2]
    return [(int(height), int(width)) for height, width in sizes]


def logits(name: str, height: int, width: int) -> Tensor:
    """The first 64 logits of a released model."""
    with np.load(_logits_file(name)) as archive:
        return torch.from_numpy(archive[f"{name}/{height}x{width}"])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def full_width_tables(height: int, width: int, dim: int) -> ops.RotaryTables:
    """`ops.full_width_rotary_tables`, float64, as made by the processor that the outputs are from.

    Their numbers are float32 arithmetic, as released. Of 96 channels one power, 10000^(10/24), was
    rounded to the nearest number there, and is rounded to the next one where torch takes AVX2.
    """
    tables = ops.full_width_rotary_tables(height, width, dim, dtype=torch.float64)
    if dim == 96:
        step = torch.tensor(10 / 24, dtype=torch.float32).double()
        frequency = torch.pow(10000.0, step).float().reciprocal()
        for table in tables:
            angles = torch.arange(len(table), dtype=torch.float32) * frequency
            exact = torch.stack((angles.cos(), angles.sin()), -1).double()
            assert (table[:, 10] - exact).abs().max() < 1e-6
            table[:, 10] = exact
    return tables
