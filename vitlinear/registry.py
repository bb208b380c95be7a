"""What OpenMMLab's packages find under the scope ``vitlinear``.

mmengine imports this module by its name when it meets ``type='vitlinear.Backbone'``, and needs
nothing else to find it, whichever of mmdet and mmseg asks. Nothing of ours imports it.
"""

from typing import Any

from mmengine import registry
from mmengine.registry import Registry

# mmengine imports the locations when something is first looked up.
LOCATIONS = ["vitlinear.dense.openmmlab"]

MODELS = Registry("model", parent=registry.MODELS, scope="vitlinear", locations=LOCATIONS)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    parent=registry.OPTIM_WRAPPER_CONSTRUCTORS,
    scope="vitlinear",
    locations=LOCATIONS,
)


# Functions, which import mmdet and mmseg only when asked: neither needs the other.
@MODELS.register_module(name="DetDataPreprocessor")
def _detection(**kwargs: Any) -> Any:
    from vitlinear.dense.openmmlab.det_preprocessor import DetDataPreprocessor

    return DetDataPreprocessor(**kwargs)


@MODELS.register_module(name="SegDataPreProcessor")
def _segmentation(**kwargs: Any) -> Any:
    from vitlinear.dense.openmmlab.seg_preprocessor import SegDataPreProcessor

    return SegDataPreProcessor(**kwargs)
