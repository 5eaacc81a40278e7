"""How much host memory this process may still take, by the machine and by its container."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CGROUP_V1_UNLIMITED = 1 << 60
"""cgroup v1 writes a page-rounded 2^63 where there is no limit."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes that can still be allocated, and what sets the limit."""

    available: int
    limited_by: str

    def shared_by(self, processes: int) -> "HostMemory":
        """One process's part where several are about to allocate the same."""
        if processes == 1:
            return self
        limited_by = f"{self.limited_by}, shared by {processes} workers,"
        return HostMemory(self.available // processes, limited_by)


def available_host_memory(root: Path = Path("/")) -> HostMemory:
    """Find the tightest limit on host memory.

    Reads what the kernel calls available, and every control group (versions 1 and 2) that this
    process is in, up to the root of each hierarchy. Memory of a group that is only page cache
    counts as available.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
    """
    candidates = [HostMemory(meminfo(root)["MemAvailable"], "free memory of the machine")]
    candidates += (
        HostMemory(max(0, maximum - used), f"the container's limit of {maximum} bytes")
        for maximum, used in _cgroup_limits(root)
    )
    return min(candidates, key=lambda candidate: candidate.available)


def cgroup_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the tightest control group of this process allows, None without a limit."""
    return min((maximum for maximum, _ in _cgroup_limits(root)), default=None)


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """Read the kernel's memory statistics, those in kB as bytes."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    fields = (line.split() for line in lines)
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in fields}


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limits of the groups that this process is in, and the bytes in use under each."""
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield from _walk(mount, group, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _walk(
                mount / "memory",
                group,
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_",
            )


def _walk(
    mount: Path, group: str, limit: str, usage: str, prefix: str
) -> Iterator[tuple[int, int]]:
    """Limits of a group and of every group above it.

    Inside a container the group's own path often does not exist under the mount, while the
    mount's top is the container's group: both are looked at.
    """
    path = Path(group.lstrip("/"))
    for part in (path, *path.parents):
        folder = mount / part
        maximum = _number(folder / limit)
        if maximum is None or maximum >= _CGROUP_V1_UNLIMITED:
            continue
        # Pages that were read twice count as active, and are given up for others all the same.
        cached = (f"{prefix}active_file", f"{prefix}inactive_file")
        used = (_number(folder / usage) or 0) - _statistics(folder / "memory.stat", cached)
        yield maximum, used


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _statistics(path: Path, names: Sequence[str]) -> int:
    values = dict(line.split(maxsplit=1) for line in _lines(path) if " " in line)
    return sum(int(values.get(name, 0)) for name in names)
