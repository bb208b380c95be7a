"""The memory that turns of measurements may take."""

import math
from pathlib import Path

import pytest

from vitlinear.benchmark.turns import available_memory

V2 = ("0::/a/b\n", "", ("memory.max", "memory.current"), "")
V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V1 = ("5:cpu:/c\n4:memory,pids:/a/b\n0::/\n", "memory", V1_NAMES, "total_")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("version", [V2, V1], ids=["v2", "v1"])
@pytest.mark.parametrize("group", ["", "a", "a/b"])
def test_memory_ends_at_the_limit_of_a_container(
    tmp_path: Path, version: tuple[str, str, tuple[str, str], str], group: str
) -> None:
    own, top, (limit, used), prefix = version
    assert available_memory(tmp_path) == math.inf
    write(tmp_path / "proc/meminfo", "MemTotal:  9 kB\nMemAvailable:  8 kB\nOdd:\n\n")
    write(tmp_path / "proc/self/cgroup", own)
    assert available_memory(tmp_path) == 8192
    folder = tmp_path / "sys/fs/cgroup" / top / group
    write(folder / used, "3000\n")
    for text, left in (("max\n", 8192), ("9223372036854771712\n", 8192), ("4000\n", 1000)):
        write(folder / limit, text)
        assert available_memory(tmp_path) == left
    write(folder / "memory.stat", f"anon 2\n{prefix}active_file 20\n{prefix}inactive_file 500\n")
    assert available_memory(tmp_path) == 1520
    write(folder / "memory.stat", f"{prefix}inactive_file 500\n")
    assert available_memory(tmp_path) == 1500


def test_the_least_limit_of_all_groups_counts(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    for group, most in (("", 9000), ("a", 5000), ("a/b", 7000), ("a/b/below", 1), ("beside", 1)):
        write(tmp_path / "sys/fs/cgroup" / group / "memory.max", f"{most}\n")
        write(tmp_path / "sys/fs/cgroup" / group / "memory.current", "3000\n")
    assert available_memory(tmp_path) == 2000
