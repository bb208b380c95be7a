"""OpenMMLab's packages, or one line that says what is wrong with them and how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

from vitlinear.errors import UserError, one_line, pip_install

INSTALL = (
    "pip install 'setuptools>=80,<82' wheel packaging ninja psutil && "
    f"{pip_install('openmmlab')} --no-build-isolation"
)


class PackageError(UserError, ImportError):
    """A package of OpenMMLab that is missing, or does not work with the others."""


def require(*modules: str) -> list[ModuleType]:
    """Import modules of OpenMMLab's packages.

    Args:
        *modules: Such as ``mmengine``, ``mmcv.ops``, ``mmdet.models``.

    Returns:
        The modules.

    Raises:
        PackageError: One is missing, was built without its operators or against another torch,
            or refuses the version of another. The message is one line with the commands that
            install what works together.
    """
    return [_require(module) for module in modules]


def _require(module: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            what = f"{package} is not installed"
        elif error.name == "mmcv._ext":
            what = f"{package} needs mmcv with its compiled operators, which this mmcv is without"
        else:
            what = f"{module} cannot be imported: {_reason(error)}"
        raise PackageError(f"{what}. Install: {INSTALL}", name=error.name) from error
    # The packages check each other's versions with asserts.
    except (ImportError, AssertionError, AttributeError, OSError) as error:
        raise PackageError(
            f"{module} does not work with what is installed: {_reason(error)}. Install: {INSTALL}",
            name=package,
        ) from error


def _reason(error: BaseException) -> str:
    return one_line(error).rstrip(".")
