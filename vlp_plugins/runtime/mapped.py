"""Tensors that are views of mapped files: where they lie, and giving their memory back.

Transformers maps the safetensors files of a model on a CPU, privately: a parameter takes no memory
until it is read, and what is written stays in this process. So a model may be bigger than the
memory, if pages that were read are given back. Linux tells what that takes; elsewhere no tensor
counts as a view of a file, and nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlp_plugins.runtime.sharding import is_sharded

_MAPS = Path("/proc/self/maps")
_PAGES = Path("/proc/self/pagemap")
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_DONTNEED = 4  # of madvise


@dataclass(frozen=True)
class Place:
    """Where in a file a tensor lies.

    Attributes:
        file: its path, links resolved.
        begin: byte of the first element.
    """

    file: str
    begin: int


def places(tensors: Iterable[torch.Tensor]) -> list[Place | None]:
    """For every tensor its place in a privately mapped file; None for other memory."""
    found: list[Place | None] = []
    mappings = _mappings()
    starts = [start for start, _, _ in mappings]
    for tensor in tensors:
        begin, end = _extent(tensor)
        index = int(np.searchsorted(starts, begin, side="right")) - 1
        if index < 0 or begin == end or end > mappings[index][1]:
            found.append(None)
            continue
        start, _, place = mappings[index]
        found.append(Place(place.file, place.begin + begin - start))
    return found


def untouched(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """For every tensor whether it is a view of a mapped file, and no page of it was written."""
    tensors = list(tensors)
    return [
        place is not None and not bool(_written(*_extent(tensor)).any())
        for tensor, place in zip(tensors, places(tensors), strict=True)
    ]


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Gives back the memory of pages that are as a file has them, which are read again when needed.

    Pages that were written stay, and so does all other memory.
    """
    if not _PAGES.exists():
        return
    for tensor in tensors:
        begin, end = _extent(tensor)
        if begin == end:
            continue
        flags = _flags(begin, end)
        given = (flags & _PRESENT != 0) & (flags & _OF_FILE != 0)
        first = begin // mmap.PAGESIZE
        edges = np.flatnonzero(np.diff(given.astype(np.int8), prepend=0, append=0))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            _drop((first + start) * mmap.PAGESIZE, (first + stop) * mmap.PAGESIZE)


def discard(tensors: Iterable[torch.Tensor]) -> None:
    """Brings back what the file has, of tensors that were `untouched` before they were written.

    Raises:
        OSError: if the system refuses (pages are locked in memory); what was written is still
            there.
    """
    for tensor in tensors:
        begin, end = _extent(tensor)
        first, last = begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
        if code := _drop(first * mmap.PAGESIZE, last * mmap.PAGESIZE):
            raise OSError(
                code,
                f"{os.strerror(code)}: the values of a file cannot be brought back into the model, "
                "whose weights stay as they were written; load it again",
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one; equal for what is not in RAM."""
    elsewhere = tensor.device.type != "cpu" or tensor.layout != torch.strided
    if elsewhere or is_sharded((tensor,)) or not tensor.numel():
        return 0, 0
    begin = tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _mappings() -> list[tuple[int, int, Place]]:
    """Privately mapped files of this process: addresses of begin and end, and the place there."""
    if sys.platform != "linux" or not _PAGES.exists():
        return []
    found = []
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        addresses, flags, offset, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and flags.endswith("p"):
            begin, end = (int(each, 16) for each in addresses.split("-"))
            found.append((begin, end, Place(path[0], int(offset, 16))))
    return found


def _written(begin: int, end: int) -> np.ndarray:
    """Of every page whether it is memory of this process, and no longer the file's."""
    flags = _flags(begin, end)
    return (flags & (_PRESENT | _SWAPPED) != 0) & (flags & _OF_FILE == 0)


def _flags(begin: int, end: int) -> np.ndarray:
    first, last = begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    with _PAGES.open("rb", buffering=0) as file:
        file.seek(8 * first)
        return np.frombuffer(file.read(8 * (last - first)), dtype=np.uint64)


def _drop(begin: int, end: int) -> int:
    """0, or the number of the system's error: then nothing was dropped."""
    library = ctypes.CDLL(None, use_errno=True)
    address, length = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
    failed = library.madvise(address, length, ctypes.c_int(_DONTNEED))
    return ctypes.get_errno() if failed else 0
