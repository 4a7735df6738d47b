"""Rows in a file that is gone whatever happens: it has no name."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from vlp_plugins.rows.layout import Layout
from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.memory import text_of

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FileStore:
    """Parts in a file of a folder; the system's file cache is all the memory that it takes.

    The file has no name in the folder (or loses it as soon as it is made), so that not even
    `kill -9` leaves it there.

    Attributes:
        layout: where a part lies.
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
        """Writes entries of a row, `values` `[m]` from column `start` on.

        Raises:
            OutputError: if the disk is full or broken.
        """
        values = values.to("cpu", self._dtype).contiguous()
        size = self._dtype.itemsize
        try:
            for offset, piece in self.layout.places(row, start, values):
                _write(self._file.fileno(), piece, offset * size)
        except OSError as error:
            raise self._failure(error) from error

    def parts(self, n: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The first `n` rows: first column of a part, and the part `[n, width]`, mapped.

        While one part is in work the system reads the next, and what was read leaves the memory of
        this process.
        """
        if not self._bytes:
            return
        mapped = mmap.mmap(self._file.fileno(), self._bytes)
        size = self._dtype.itemsize
        places = [
            (start, width, offset * size, n * width * size)
            for start, width, offset in self.layout.parts()
        ]
        _advise(mapped, mmap.MADV_WILLNEED, *places[0][2:])
        for (start, width, offset, length), following in zip(
            places, [*places[1:], None], strict=True
        ):
            if following:
                _advise(mapped, mmap.MADV_WILLNEED, *following[2:])
            flat = torch.frombuffer(mapped, dtype=self._dtype, count=n * width, offset=offset)
            yield start, flat.view(n, width)
            _advise(mapped, mmap.MADV_DONTNEED, offset, length)

    def close(self) -> None:
        """Gives the disk space back."""
        self._file.close()

    def _failure(self, error: OSError) -> OutputError:
        full = error.errno in _FULL
        reason = "no space left on the disk, or a quota is used up" if full else error.strerror
        return OutputError(
            f"cannot keep {text_of(self._bytes)} of gradient rows in {self._folder}: {reason}; "
            "choose another folder (the job's work folder, or TMPDIR), raise memory_budget so that "
            "they fit into memory, or say keep_in='passes', which needs no disk and more time"
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


def _advise(mapped: mmap.mmap, advice: int, start: int, length: int) -> None:
    """Tells the system about a range of a file; it goes by whole pages."""
    first = start - start % mmap.PAGESIZE
    mapped.madvise(advice, first, start + length - first)
