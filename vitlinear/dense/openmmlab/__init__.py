"""Backbones and optimizer rules for OpenMMLab's packages: mmdet 3, mmseg 1, mmengine, mmcv 2.

Everything under this folder needs them; its import raises `PackageError` without.
"""

from .packages import PackageError, require

require("mmengine.runner")

from .mm_backbone import Backbone  # noqa: E402  (the line above says what is missing)
from .optimizer import LayerDecayOptimWrapperConstructor  # noqa: E402

__all__ = ["Backbone", "LayerDecayOptimWrapperConstructor", "PackageError", "require"]
