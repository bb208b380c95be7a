"""The processor that a command runs on, by its name."""

import contextlib
import platform
from pathlib import Path


def cpu_model() -> str:
    """Returns the processor's name, or what kind it is where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
