"""Memory and disk: amounts as people write them, what is free, what this process holds."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from vlp_plugins.runtime.errors import UnsupportedError

try:
    import resource
except ImportError:  # Windows, which says neither what is free nor what was the peak
    resource = None  # type: ignore[assignment]

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def bytes_of(amount: int | str) -> int:
    """`"8GiB"`, `"500 MB"` or a number of bytes.

    Raises:
        UnsupportedError: for anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(amount).strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or not 1 <= (found := float(match[1]) * factor) < math.inf:
        raise UnsupportedError(
            f"{amount!r:.80} is not an amount of memory; write for instance 8GiB"
        )
    return int(found)


_MOST = 2**100
"""Bytes that are said as they are; what a file says of itself may be more."""


def text_of(amount: int) -> str:
    """`8.0 GiB`."""
    value = float(min(amount, _MOST))
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f} {unit}" if unit != "bytes" else f"{amount} bytes"
        value /= 1024
    return f"{value:.1f} TiB"


_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_LASTING = Path("/var/tmp")
_SHARE = 0.75
_DISK_SHARE = 0.9
_UNKNOWN = 2**31
"""Bytes of RAM that are taken for free where the system says nothing."""


def usable_bytes(device: torch.device, reserved: int) -> int:
    """Three quarters of the free memory of a device that `reserved` bytes leave.

    A CPU stands for the RAM, which the processes of a machine share.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        # What torch holds and does not use is free, too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = free_ram() // local_processes()
    return max(0, int(_SHARE * (free - reserved)))


def usable_disk(folder: Path) -> int:
    """Bytes that this process may take in a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return int(_DISK_SHARE * shutil.disk_usage(existing).free) // local_processes()


def spill_folder(folder: Path | None) -> Path:
    """That folder, or the one for large temporary files: `TMPDIR`, else /var/tmp.

    /tmp is often a piece of the RAM.
    """
    if folder is not None:
        return folder
    if "TMPDIR" not in os.environ and os.access(_LASTING, os.W_OK):
        return _LASTING
    return Path(tempfile.gettempdir())


def free_ram() -> int:
    """Bytes of RAM that this process can still get without swapping.

    The limit of a control group (a container, a batch system) counts where there is one.
    """
    return min(_free_of_machine(), _free_of_group())


def local_processes() -> int:
    """Number of processes on this machine that share the work (`torchrun`)."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _free_of_machine() -> int:
    free = _field(_MEMINFO, "MemAvailable")
    # Other systems do not say what is free; half of all RAM is a guess on the safe side.
    if free is not None or not hasattr(os, "sysconf"):
        return free or _UNKNOWN
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_of_group() -> int:
    """What the limits of this process's control group and those above it leave."""
    free = _free_of_machine()
    if not _CGROUP.exists():
        return free
    own = [line[3:] for line in _CGROUP.read_text().splitlines() if line.startswith("0::")]
    for group in (g for name in own for g in _with_parents(_CGROUPS / name.lstrip("/"))):
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            statistics = (group / "memory.stat").read_text().split()
        except (OSError, ValueError):
            continue
        if limit != "max":
            cache = int(statistics[statistics.index("inactive_file") + 1])
            free = min(free, int(limit) - used + cache)
    return max(0, free)


def _with_parents(group: Path) -> list[Path]:
    return [group, *(parent for parent in group.parents if parent.is_relative_to(_CGROUPS))]


_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Bytes of this process that are in RAM; its peak where the system tells only that."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most bytes of this process that ever were in RAM; 0 where the system does not tell.

    Linux counts in `ru_maxrss` what the parent held before it started this program; `VmHWM` is
    of this program alone.
    """
    if peak := _field(_STATUS, "VmHWM"):
        return peak
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _field(file: Path, name: str) -> int | None:
    """Bytes of a field in kB of a file of /proc; None where the system has none."""
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def peak_device_bytes(device: torch.device) -> int | None:
    """The most bytes that tensors of this process ever held on a CUDA device; None on others."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
