"""How much memory this process may still take and has taken, from the system's own files; no dependency.

Where the files do not exist (not Linux) the answers are None, and nobody is limited by a guess.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def available_memory(*, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that can be taken without swapping: the machine's, or what the tightest control group leaves."""
    found = [_machine_available(proc), *(_group_available(folder) for folder in _group_folders(proc, cgroups))]
    return min((bytes_ for bytes_ in found if bytes_ is not None), default=None)


def peak_memory() -> int | None:
    """The most bytes that this process has held resident so far."""
    peak = _field(_PROC / "self" / "status", "VmHWM:")
    if peak is not None:
        return peak * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int | None:
    """Bytes that this process holds resident now."""
    resident = _field(_PROC / "self" / "status", "VmRSS:")
    return None if resident is None else resident * 1024


def _machine_available(proc: Path) -> int | None:
    kilobytes = _field(proc / "meminfo", "MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _group_folders(proc: Path, cgroups: Path) -> list[Path]:
    """The folders of this process's memory group and of the groups around it, of either version of control groups.

    In a container the path that the kernel names may not exist; the mount's root is then the group's own folder.
    """
    folders = []
    for line in _lines(proc / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root = cgroups if number == "0" else cgroups / "memory"
        folder = root / name.strip("/")
        folders += [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]
    return list(dict.fromkeys(folders))


def _group_available(folder: Path) -> int | None:
    """What a group's limit leaves; the cache of files counts as free, because the kernel drops it first."""
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is None or usage is None or limit >= _UNLIMITED:
            continue
        return max(limit - usage + (_field(folder / "memory.stat", cache_name) or 0), 0)
    return None


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    for line in _lines(path):
        words = line.split()
        if words and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
