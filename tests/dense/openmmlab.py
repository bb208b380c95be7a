"""What tests with mmdet and mmseg share: the packages, or the reason of a skip."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest


def packages() -> None:
    """Skip a test file where OpenMMLab's packages are not installed; in CI they have to be."""
    if importlib.util.find_spec("mmcv") is None and not os.environ.get("CI"):
        pytest.skip(
            "OpenMMLab's packages are not installed (python3 tools/run_tests.py installs them)",
            allow_module_level=True,
        )


def build(config: dict[str, Any], scope: str) -> Any:
    """A detector or segmentor from its config; ``scope`` is ``mmdet`` or ``mmseg``."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(scope)
    return MODELS.build(config)
