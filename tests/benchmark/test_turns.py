"""The memory that turns of measurements may take."""

import math
from pathlib import Path

import pytest

from vitlinear.benchmark.turns import available_memory


@pytest.mark.parametrize(
    ("limit", "used", "unused_files"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_memory_ends_at_the_limit_of_a_container(
    tmp_path: Path, limit: str, used: str, unused_files: str
) -> None:
    meminfo = tmp_path / "meminfo"
    assert available_memory(meminfo, tmp_path) == math.inf
    meminfo.write_text("MemTotal:  9 kB\nMemAvailable:  8 kB\nHugePages_Total: 0\n")
    assert available_memory(meminfo, tmp_path) == 8192
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / used).write_text("3000\n")
    (tmp_path / limit).with_name("memory.stat").write_text(f"anon 2000\n{unused_files} 500\n")
    for text, left in (("max\n", 8192), ("9223372036854771712\n", 8192), ("4000\n", 1500)):
        (tmp_path / limit).write_text(text)
        assert available_memory(meminfo, tmp_path) == left
