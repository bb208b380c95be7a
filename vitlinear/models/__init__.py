"""Backbones registered with timm, one family a file.

Every file here whose name begins without an underscore is a family, and is imported: that registers
its models. The others are what families share.
"""

from importlib import import_module
from pkgutil import iter_modules

from ._names import input_size, num_parameters, on_meta, our_models

__all__ = ["import_families", "input_size", "num_parameters", "on_meta", "our_models"]


def import_families() -> None:
    """Import every family, those that have been imported excepted."""
    for module in iter_modules(__path__):
        if not module.name.startswith("_"):
            import_module(f"{__name__}.{module.name}")


import_families()
