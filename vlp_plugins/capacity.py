"""How much memory and disk there is, if nobody said how much may be taken."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_LASTING = Path("/var/tmp")
_SHARE = 0.75
_DISK_SHARE = 0.9


def usable_bytes(device: torch.device, beside: int) -> int:
    """Bytes that may be taken of the memory of a device: three quarters of what is free.

    Args:
        device: a CPU stands for the RAM, which the processes of a machine share.
        beside: bytes that the caller will need for other things.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        # What torch holds and does not use is free, too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = free_ram() // local_processes()
    return max(0, int(_SHARE * (free - beside)))


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
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Others do not tell what is free; half of what there is is a guess on the safe side.
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
