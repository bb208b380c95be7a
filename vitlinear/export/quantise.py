"""Int8 in an ONNX program: matrix products with weights, and nothing else.

Quantised are the products of activations with constant weights: projections, feed-forward
networks and 1 x 1 convolutions. What linear attention computes from them stays in float32: feature
maps, states, normalisers, softmaxes and the products of two activations, whose ranges depend on the
number of tokens, and so do norms, other convolutions, and the small products that make the kernels
of InLine's convolution.

Post-training, static, as QuantizeLinear and DequantizeLinear around each product, which any runtime
of ONNX can run and onnxruntime fuses with it:

- Inputs are uint8 with one range for a tensor, the least and the greatest value on the calibration
  images. Ranges taken while running (dynamic quantisation) would be those of a whole batch, so that
  an image's logits depend on the images beside it.
- Weights are int8, symmetric, one scale for each output channel, from -64 to 64: a processor
  without VNNI adds pairs of products in 16 bits, which 128 * 255 * 2 would overflow. So what was
  checked on one machine holds on others.
- Outputs are float32 sums; they are not rounded again.
- Biases are rows, [1, C]. Of a product and a bias [C] onnxruntime (1.32) makes one Gemm where sizes
  are fixed, turns its int8 weights into float32 at every run, and multiplies in float32.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from vitlinear.errors import UserError

from . import onnx_file
from .calibration import Calibration
from .shapes import Shapes

KINDS = ("MatMul", "Gemm", "Conv")
BATCH = 8  # images that are calibrated on at a time, for the sake of memory


def products(graph: Any) -> list[Any]:
    """The nodes of an ONNX graph that multiply activations with constant weights."""
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def is_product(node: Any) -> bool:
        if node.op_type not in KINDS or node.input[0] in constants:
            return False
        weight = constants.get(node.input[1])
        if weight is None:
            return False
        if node.op_type != "Conv":
            return len(weight.dims) == 2  # of three, the kernels of InLine's convolution by head
        groups = next((each.i for each in node.attribute if each.name == "group"), 1)
        return groups == 1 and math.prod(weight.dims[2:]) == 1

    return [node for node in graph.node if is_product(node)]


def projections(model: nn.Module) -> list[nn.Module]:
    """The modules whose products these are."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
    ]


def biases_to_rows(graph: Any, sums: set[str]) -> None:
    """Reshape the constants [C] that are added to some values to [1, C], in place.

    Args:
        graph: Of the program; the values have two dimensions or more.
        sums: Names of the values.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    rows = {}
    for node in graph.node:
        if node.op_type != "Add" or not sums.intersection(node.input):
            continue
        for place, name in enumerate(node.input):
            if name in constants and len(constants[name].dims) == 1:
                row = rows.setdefault(name, type(constants[name])())
                row.CopyFrom(constants[name])
                row.name = f"{name}_row"
                row.dims.insert(0, 1)
                node.input[place] = row.name
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for name, tensor in constants.items() if name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *rows.values()])


class _Batches:
    """Calibration images as onnxruntime asks for them."""

    def __init__(self, calibration: Calibration, size: int, name: str) -> None:
        self.batches, self.name = calibration.batches(size), name

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}


def quantise(path: Path, model: nn.Module, shapes: Shapes, calibration: Calibration) -> None:
    """Quantise the program in a file, in place.

    Args:
        path: An ONNX program in float32.
        model: What the program is of.
        shapes: Sizes that it takes.
        calibration: Images to take ranges from.

    Raises:
        UserError: Some product of the model would be left in float32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    program = onnx.load(path)
    nodes = products(program.graph)
    quantize_static(
        path,
        path,
        _Batches(calibration, shapes.batch.nearest(BATCH), program.graph.input[0].name),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(KINDS),
        nodes_to_quantize=[node.name for node in nodes],
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"OpTypesToExcludeOutputQuantization": list(KINDS)},
    )
    written = onnx.load(path)
    biases_to_rows(written.graph, {node.output[0] for node in nodes if node.op_type == "MatMul"})
    onnx_file.save(written, path, {each.key: each.value for each in program.metadata_props})
    quantised = sum(
        math.prod(tensor.dims)
        for tensor in written.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    )
    expected = sum(module.weight.numel() for module in projections(model))  # type: ignore[operator, union-attr]
    if quantised != expected:
        raise UserError(
            f"{quantised:,} of {expected:,} weights of projections became int8, and the rest would "
            "stay in float32: report this model, with the versions of torch and onnxscript"
        )
