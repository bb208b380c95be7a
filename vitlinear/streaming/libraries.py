"""Libraries for files of large images, which are installed on request."""

from __future__ import annotations

import importlib
from typing import Any

from vitlinear.errors import UserError, pip_install


def load_library(name: str, extra: str) -> Any:
    """A library by its name.

    Args:
        name: Of the module, and of the package.
        extra: Of vitlinear, which brings it.

    Raises:
        UserError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs {error.name or name}, which is missing: {pip_install(extra)}"
        ) from error
