"""Int8 in an ONNX program: products and convolutions with weights.

Quantised is what multiplies activations with constant weights: projections, feed-forward networks
and convolutions, but for the one that reads the images. What linear attention computes from them
stays in float32: feature maps, states, normalisers, softmaxes and the products of two activations,
whose ranges depend on the number of tokens, and so do norms, sums, and the small products that make
the kernels of InLine's convolution.

Post-training, static, as QuantizeLinear and DequantizeLinear around each product, which any runtime
of ONNX can run. The form is the one that onnxruntime (1.32) and OpenVINO (2026.4) both turn into
integer kernels:

- Activations are uint8 with one range for a tensor, the least and the greatest value on the
  calibration images. Ranges taken while running (dynamic quantisation) would be those of a whole
  batch, so that an image's logits depend on the images beside it.
- The range of what a matrix product reads is symmetric, so that its zero is 128. Of another zero
  OpenVINO makes a subtraction before each product.
- Weights are int8, symmetric, one scale for each output channel, from -64 to 64: a processor
  without VNNI adds pairs of products in 16 bits, which 128 * 255 * 2 would overflow. So what was
  checked on one machine holds on others.
- Outputs of matrix products are float32 sums, not rounded again. Those of convolutions are uint8:
  of a convolution with float32 outputs onnxruntime makes one that multiplies in float32.
- A product and its bias are one Gemm on rows, [B N, C]. Of a product [B, N, C] and a bias
  onnxruntime makes a Gemm where sizes are fixed, after it has looked for integers: it would
  multiply in float32.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vitlinear.errors import UserError

from . import onnx_file
from .calibration import Calibration
from .shapes import Shapes

KINDS = ("MatMul", "Gemm", "Conv")
BATCH = 8  # images that are calibrated on at a time, for the sake of memory
NORMS = ("LayerNormalization", "RMSNormalization", "InstanceNormalization")
LEFT = "float32"  # key of the file's metadata: what stays so


def products(graph: Any, channels: int) -> list[Any]:
    """The nodes of an ONNX graph that multiply activations with constant weights.

    Not the convolution that reads the images: it has few channels to add up, and the most to lose.

    Args:
        graph: Of the program.
        channels: Of the images.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    convs = [node for node in graph.node if node.op_type == "Conv" and node.input[1] in constants]
    reads_images = next((c for c in convs if constants[c.input[1]].dims[1] == channels), None)

    def is_product(node: Any) -> bool:
        if node.op_type not in KINDS or node.input[0] in constants:
            return False
        weight = constants.get(node.input[1])
        if weight is None:
            return False
        if node.op_type == "Conv":
            return node is not reads_images
        return len(weight.dims) == 2  # of three, the kernels of InLine's convolution by head

    return [node for node in graph.node if is_product(node)]


def projections(model: nn.Module, channels: int) -> list[nn.Module]:
    """The modules whose products these are.

    Args:
        model: What the program is of.
        channels: Of the images.
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    reads_images = next((conv for conv in convs if conv.in_channels == channels), None)
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module is not reads_images
    ]


def biases_into_products(graph: Any) -> None:
    """Make one Gemm of each MatMul with a constant [C, D] and the Add of a constant [D], in place.

    It multiplies rows: what is before and behind it has the shape that it had.

    Args:
        graph: Of the program.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {each.name for each in graph.output}
    nodes, done = [], set()

    def constant(name: str, values: list[int]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    for node in graph.node:
        if id(node) in done:
            continue
        weight = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        adds = users.get(node.output[0], ())
        bias = None
        if weight is not None and len(weight.dims) == 2 and len(adds) == 1:
            (add,) = adds
            others = [name for name in add.input if name != node.output[0]]
            if add.op_type == "Add" and len(others) == 1 and node.output[0] not in outputs:
                bias = constants.get(others[0])
        if weight is None or bias is None or len(bias.dims) != 1:
            nodes.append(node)
            continue
        name = node.name or node.output[0]
        width = constant(f"{name}_width", [weight.dims[1]])
        rows = constant(f"{name}_rows", [-1, weight.dims[0]])
        nodes += [
            helper.make_node("Shape", [node.input[0]], [f"{name}_shape"], f"{name}_shape", end=-1),
            helper.make_node(
                "Concat", [f"{name}_shape", width], [f"{name}_sides"], f"{name}_sides", axis=0
            ),
            helper.make_node("Reshape", [node.input[0], rows], [f"{name}_in"], f"{name}_in"),
            helper.make_node(
                "Gemm", [f"{name}_in", weight.name, bias.name], [f"{name}_out"], f"{name}_gemm"
            ),
            helper.make_node(
                "Reshape", [f"{name}_out", f"{name}_sides"], [add.output[0]], f"{name}_reshape"
            ),
        ]
        done.add(id(add))
    del graph.node[:]
    graph.node.extend(nodes)


class _Norms:
    """Tells the steps of norms from others in an ONNX graph.

    Few norms are one node. Others are a mean of squares, to which something is added before the
    root is taken; and layer norms first take away a mean. A mean is a ReduceMean, or a product with
    equal weights, as channels-first programs have it.
    """

    def __init__(self, graph: Any) -> None:
        self.constants = {each.name: each for each in graph.initializer}
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)

    def is_mean(self, node: Any) -> bool:
        from onnx import numpy_helper

        if node.op_type != "MatMul":
            return bool(node.op_type == "ReduceMean")
        factor, maker = self.constants.get(node.input[0]), self.made_by.get(node.input[0])
        if factor is None and maker is not None and maker.op_type == "Expand":  # at any size
            factor = self.constants.get(maker.input[0])
        if factor is None:
            return False
        weights = numpy_helper.to_array(factor)
        return bool((weights == weights.flat[0]).all() and weights.flat[0] != 0)

    def ends(self, node: Any) -> bool:
        """Whether a norm's root is taken of what this node gives; each norm has one such mean."""
        if node.op_type in NORMS:
            return True
        sums = [user for user in self._users(node) if user.op_type == "Add"]
        return self.is_mean(node) and any(
            user.op_type == "Sqrt" for each in sums for user in self._users(each)
        )

    def begins(self, node: Any) -> bool:
        """Whether this is the mean that a layer norm takes away before."""
        if not self.is_mean(node):
            return False
        x = node.input[1 if node.op_type == "MatMul" else 0]  # of a ReduceMean, axes come second
        return any(user.op_type == "Sub" and user.input[0] == x for user in self._users(node))

    def _users(self, node: Any) -> list[Any]:
        return self.users.get(node.output[0], [])


def left_in_float32(graph: Any, quantised: set[str]) -> str:
    """Names, for people, the products, norms, means and softmaxes that are not quantised.

    Args:
        graph: Of the program in float32.
        quantised: Names of the nodes that are not.
    """
    norms = _Norms(graph)
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.name in quantised or norms.begins(node):
            continue
        if norms.ends(node):
            counts["norms"] += 1
        elif norms.is_mean(node):
            counts["means"] += 1
        elif node.op_type == "Softmax":
            counts["softmaxes"] += 1
        elif node.op_type == "Conv":
            made = node.input[1] not in norms.constants
            counts["convolutions with computed kernels" if made else "convolution of images"] += 1
        elif node.op_type in ("MatMul", "Gemm"):
            both = not norms.constants.keys() & set(node.input[:2])
            counts["products of two activations" if both else "other products"] += 1
    return ", ".join(
        [*(f"{count} {kind}" for kind, count in counts.items()), "sums and activations"]
    )


class _Batches:
    """Calibration images as onnxruntime asks for them."""

    def __init__(self, calibration: Calibration, size: int, name: str) -> None:
        self.batches, self.name = calibration.batches(size), name

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}


def quantise(path: Path, model: nn.Module, shapes: Shapes, calibration: Calibration) -> str:
    """Quantise the program in a file, in place.

    Args:
        path: An ONNX program in float32.
        model: What the program is of.
        shapes: Sizes that it takes.
        calibration: Images to take ranges from.

    Returns:
        What stays in float32, which the file says of itself too.

    Raises:
        UserError: Some product of the model would be left in float32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    program = onnx.load(path)
    biases_into_products(program.graph)
    nodes = products(program.graph, shapes.channels)
    left = left_in_float32(program.graph, {node.name for node in nodes})
    onnx.save(program, path)
    read = {node.input[0] for node in nodes if node.op_type != "Conv"}
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
        extra_options={
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            "TensorQuantOverrides": {name: [{"symmetric": True}] for name in read},
        },
    )
    written = onnx.load(path)
    metadata = {each.key: each.value for each in program.metadata_props}
    onnx_file.save(written, path, {**metadata, LEFT: left})
    quantised = sum(
        math.prod(tensor.dims)
        for tensor in written.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    )
    modules = projections(model, shapes.channels)
    expected = sum(module.weight.numel() for module in modules)  # type: ignore[operator, union-attr]
    if quantised != expected:
        raise UserError(
            f"{quantised:,} of {expected:,} weights of products became int8, and the rest would "
            "stay in float32: report this model, with the versions of torch and onnxscript"
        )
    return left
