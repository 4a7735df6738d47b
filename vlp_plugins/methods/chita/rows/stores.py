"""Stores of rows: in memory or in an unnamed file, some of the columns in each process."""

from __future__ import annotations

import errno
import os
import tempfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import distributed

from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.runtime.parallel import ahead


@dataclass(frozen=True)
class Layout:
    """Parts `[n, width]` one after the other. A row is written in pieces, a part is read whole.

    Attributes:
        n: number of rows that there is room for.
        cuts: first column of every part, then the end of the last; strictly ascending.
    """

    n: int
    cuts: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Of all parts."""
        return self.n * (self.cuts[-1] - self.cuts[0])

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """First column of every part, its width, and where it lies (in elements)."""
        for start, stop in pairwise(self.cuts):
            yield start, stop - start, self.n * (start - self.cuts[0])

    def places(
        self, row: int, start: int, values: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Where the entries of a row go.

        Args:
            row: index of the row.
            start: column of the first value.
            values: `[m]`.

        Yields:
            A position in elements, and the values that belong there; columns of other layouts are
            left out.
        """
        first, stop = max(start, self.cuts[0]), min(start + len(values), self.cuts[-1])
        index = bisect_right(self.cuts, first) - 1
        while first < stop:
            left, right = self.cuts[index : index + 2]
            last = min(stop, right)
            offset = self.n * (left - self.cuts[0]) + row * (right - left) + first - left
            yield offset, values[first - start : last - start]
            first, index = last, index + 1


_CHUNK = 1 << 20
"""Columns that travel at a time: 4 MiB of float32 from every process."""


def exchange(
    entries: Callable[[int, int], torch.Tensor],
    ranges: Sequence[tuple[int, int]],
    receive: Callable[[int, int, torch.Tensor], None],
) -> None:
    """Every process sends its row to those that hold the columns, a chunk at a time.

    Args:
        entries: computes entries `[stop - start]` of the row of this process, float32.
        ranges: by process, first column that it holds and the one after the last.
        receive: called with (process, first column, its entries from there on).
    """
    rank, processes = rank_and_size()
    for owner, (start, stop) in enumerate(ranges):
        for first in range(start, stop, _CHUNK):
            sent = entries(first, min(first + _CHUNK, stop))
            got = [torch.empty_like(sent) for _ in range(processes)] if rank == owner else None
            distributed.gather(sent, got, dst=owner)
            for sender, row in enumerate(got or ()):
                receive(sender, first, row)


class Store(ABC):
    """Room for the rows of some columns, part by part.

    Attributes:
        layout: where a part lies.
    """

    layout: Layout

    @abstractmethod
    def write(self, row: int, start: int, values: torch.Tensor) -> None:
        """Writes entries of a row, `values` `[m]` from column `start` on.

        Raises:
            OutputError: if a disk is full or broken.
        """

    @abstractmethod
    def parts(self, n: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The first `n` rows: first column of a part, and the part `[n, width]`."""


class MemoryStore(Store):
    """Parts in one tensor."""

    def __init__(self, layout: Layout, flat: torch.Tensor) -> None:
        """Takes what it needs of a tensor.

        Args:
            layout: where a part lies.
            flat: `[m]` of at least `layout.elements`; what is in it does not matter.
        """
        self.layout = layout
        self._flat = flat

    def write(self, row: int, start: int, values: torch.Tensor) -> None:
        for offset, piece in self.layout.places(row, start, values):
            self._flat[offset : offset + len(piece)].copy_(piece)

    def parts(self, n: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start, width, offset in self.layout.parts():
            yield start, self._flat[offset : offset + n * width].view(n, width)


ELSEWHERE = (
    "choose another folder (the job's work folder, or TMPDIR), raise memory_budget so that they "
    "fit into memory, or say keep_in='passes', which needs no disk and more time"
)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FileStore(Store):
    """Parts in a file of a folder; the system's file cache is all the memory that it takes.

    The file has no name in the folder (or loses it as soon as it is made), so that not even
    `kill -9` leaves it there.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, folder: Path) -> None:
        """Makes a file of full size: a disk that is too small is found here, not hours later.

        Args:
            layout: where a part lies.
            dtype: of the entries.
            folder: where to; made if it is not there.

        Raises:
            OutputError: if there is no room, or if the folder cannot be written to.
        """
        self.layout = layout
        self._dtype = dtype
        self._folder = folder
        self._bytes = layout.elements * dtype.itemsize
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".rows-", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise self._failure(error) from error
        try:
            _reserve(self._file.fileno(), self._bytes)
        except OSError as error:
            self._file.close()
            raise self._failure(error) from error

    def write(self, row: int, start: int, values: torch.Tensor) -> None:
        values = values.to("cpu", self._dtype).contiguous()
        size = self._dtype.itemsize
        try:
            for offset, piece in self.layout.places(row, start, values):
                _write(self._file.fileno(), piece, offset * size)
        except OSError as error:
            raise self._failure(error) from error

    def parts(self, n: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The first `n` rows; while one part is in work a thread reads the next."""
        widest = max((width for _, width, _ in self.layout.parts()), default=0)
        buffers = torch.empty((2, n * widest), dtype=self._dtype)

        def read(item: tuple[int, tuple[int, int, int]]) -> tuple[int, torch.Tensor]:
            index, (start, width, offset) = item
            part = buffers[index % 2, : n * width]
            _read(self._file.fileno(), part, offset * self._dtype.itemsize)
            return start, part.view(n, width)

        try:
            yield from ahead(read, enumerate(self.layout.parts()), 1)
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Gives the disk space back."""
        self._file.close()

    def _failure(self, error: OSError) -> OutputError:
        full = error.errno in _FULL
        reason = "no space left on the disk, or a quota is used up" if full else error.strerror
        return OutputError(
            f"cannot keep {text_of(self._bytes)} of gradient rows in {self._folder}: {reason}; "
            f"{ELSEWHERE}"
        )


def _reserve(descriptor: int, length: int) -> None:
    if not length:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, length)
        return
    free = os.fstatvfs(descriptor)
    if free.f_bavail * free.f_frsize < length:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, length)


def _write(descriptor: int, values: torch.Tensor, position: int) -> None:
    """Writes all of a contiguous tensor; the system may take it in pieces."""
    data = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(data):
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def _read(descriptor: int, values: torch.Tensor, position: int) -> None:
    """Reads all of a contiguous tensor; the system may give it in pieces."""
    data = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(data):
        count = os.preadv(descriptor, [data], position)
        if not count:
            raise OSError(errno.EIO, "the file of the rows is too short")
        data, position = data[count:], position + count
