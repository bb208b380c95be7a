"""Speed of the runtimes of ONNX: which models to rewrite for each, and with which steps."""

from __future__ import annotations

from torch import nn

from vitlinear.errors import check_choice
from vitlinear.models._isotropic import IsotropicBackbone
from vitlinear.models.inline_cswin import InLineCSwin
from vitlinear.models.inline_swin import InLineSwin
from vitlinear.models.pola_pvt import PolaPVT
from vitlinear.models.pola_swin import PolaSwin

from .attention import ChannelsFirstGatedAttention
from .layers import ChannelNorm, ChannelRmsNorm, Pointwise

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
RUNTIMES = (ONNXRUNTIME, OPENVINO)
# Bytes of the map of one image. A larger one was measured not to stay in cache (docs/export.md).
LARGE_MAP = 8 * 2**20
MANY_CHANNELS = 128  # of fewer a convolution reads few bytes again
# Models whose blocks have no convolution but in their attention.
OF_PRODUCTS = (IsotropicBackbone, InLineCSwin, InLineSwin, PolaPVT, PolaSwin)


def pays(model: nn.Module, runtime: str) -> bool:
    """Whether a runtime of `RUNTIMES` is no slower with what `rewrite` makes of a model's kind.

    Measured in float32 (docs/export.md). OpenVINO keeps [B, N, C] as it is from product to product,
    so the own steps of models that have little else are faster there.

    Raises:
        UserError: There is no such runtime.
    """
    check_choice("runtime", runtime, RUNTIMES)
    return runtime != OPENVINO or not isinstance(model, OF_PRODUCTS)


def choose_steps(model: nn.Module, runtime: str, fixed: bool) -> None:
    """Let the layers of a rewritten model take the steps that a runtime is fastest with.

    Measured in float32 (docs/export.md):

    - Means over channels. onnxruntime takes 2 to 4 times as long for them as for a product with
      equal weights. OpenVINO is as fast with either, but has its convolutions' maps channels-last,
      which a product would have it copy twice.
    - Products with weights. 1x1 convolutions of onnxruntime take up to twice as long as matrix
      products where the map is too large for the cache: they seem to read all of it anew for each
      group of channels that they put out. On smaller maps they are faster.
    - Products with queries, keys, values and gates. OpenVINO copies what its 1x1 convolutions put
      out to other places in memory, before attention can read it. A matrix product needs no copy,
      which pays on large maps.

    Args:
        model: Made by `rewrite`; changed in place.
        runtime: One of `RUNTIMES`.
        fixed: Whether heights and widths of the program do not vary.
    """
    for module in model.modules():
        if isinstance(module, ChannelNorm | ChannelRmsNorm):
            module.by_products = runtime != OPENVINO
        elif not fixed:
            continue
        elif runtime == OPENVINO and isinstance(module, ChannelsFirstGatedAttention):
            for product in (*module.q, *module.k, module.v, module.o):
                product.large_map = LARGE_MAP
        elif runtime == ONNXRUNTIME and isinstance(module, Pointwise):
            # A map of just that size was faster in a convolution.
            module.large_map = LARGE_MAP + 1 if module.in_channels >= MANY_CHANNELS else None
