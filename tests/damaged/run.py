"""Reads damaged files within limits of memory and time, and watches what is written."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from formats import Format, Refused, World, formats

from vlp_plugins.runtime.errors import VlpError

SECONDS = 20
BYTES = 2 * 2**30
LONGEST = 1500
"""Characters of a sentence that one still reads."""


@dataclass
class Tally:
    """What became of the files of one kind.

    Attributes:
        files: how many there were.
        read: of them, in full.
        refused: with one sentence.
        slowest: seconds.
        unexpected: of each of the others, what happened and how to repeat it.
    """

    files: int = 0
    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    unexpected: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Tally]) -> Tally:
        """The sum."""
        whole = cls()
        for part in parts:
            whole.files += part.files
            whole.read += part.read
            whole.refused += part.refused
            whole.slowest = max(whole.slowest, part.slowest)
            whole.unexpected += part.unexpected
        return whole


def read_files(
    folder: Path,
    files: int,
    *,
    seed: int = 0,
    only: str = "",
    number: int | None = None,
    keep: Path | None = None,
    done: Callable[[str, Tally], None] | None = None,
) -> dict[str, Tally]:
    """Damages and reads so many files.

    Args:
        folder: an empty one, for all that is made.
        files: of all kinds together.
        seed: of the damage; a file depends on it, its kind and its number only.
        only: the kind of that name, or kinds whose name contains it.
        number: only this file of each kind, with its traceback.
        keep: new folder for a copy of the last damaged file.
        done: called with every kind when all files of it are read.

    Returns:
        By kind what became of its files.
    """
    torch.set_num_threads(1)
    kinds = formats(World(folder / "world"))
    kinds = [kind for kind in kinds if kind.name == only] or [k for k in kinds if only in k.name]
    shares = sum(kind.share for kind in kinds)
    found = {kind.name: Tally() for kind in kinds}
    case = folder / "case"
    with _quiet():
        for kind in kinds:  # what is whole is made, and imported, before anything is measured
            with _new(case):
                kind.write(Random(0), case / "in")
                with suppress(Refused, Exception):
                    kind.read(Random(0), case / "in", case / "out")
    with _quiet(), _watched(folder) as written:
        for kind in kinds:
            numbers = range(max(1, round(files * kind.share / shares)))
            for each in numbers if number is None else [number]:
                with _new(case):
                    _read_one(
                        kind, seed, each, case, written, found[kind.name], loud=number is not None
                    )
                    if keep is not None:
                        shutil.copytree(case / "in", keep, dirs_exist_ok=True)
            if done is not None:
                done(kind.name, found[kind.name])
    return found


def _read_one(
    kind: Format,
    seed: int,
    number: int,
    case: Path,
    written: list[Path],
    tally: Tally,
    *,
    loud: bool,
) -> None:
    text = f"{seed}|{kind.name}|{number}"
    rng = Random(hashlib.sha256(text.encode()).digest())
    kind.write(rng, case / "in")
    written.clear()
    start, what = time.perf_counter(), ""
    tally.files += 1
    try:
        with _limits():
            kind.read(rng, case / "in", case / "out")
        tally.read += 1
    except (Refused, VlpError) as error:
        tally.refused += 1
        if len(str(error)) > LONGEST:
            what = f"a sentence of {len(str(error)):,} characters: {str(error)[:200]!r}"
    except BaseException as error:
        if loud:
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in place if "vlp_" in frame.filename] or place
        what = (
            f"{type(error).__name__}: {str(error)[:200]!r} at {own[-1].filename}:{own[-1].lineno}"
        )
    seconds = time.perf_counter() - start
    tally.slowest = max(tally.slowest, seconds)
    allowed = [case / "out", case / "tmp", *([case / "in"] if kind.resumes else [])]
    outside = [path for path in written if not any(path.is_relative_to(each) for each in allowed)]
    if outside:
        what += f" wrote {outside[0]}"
    if seconds > SECONDS:
        what += f" took {seconds:.0f} s"
    if what:
        again = f"python tests/damaged --seed {seed} --only {kind.name!r} --number {number}"
        tally.unexpected.append(f"{kind.name}: {what}\n    {again}")


@contextmanager
def _new(case: Path) -> Iterator[None]:
    """The folder of one file: what is read lies in `in`, results in `out`."""
    shutil.rmtree(case, ignore_errors=True)
    for name in ("in", "out", "tmp"):
        (case / name).mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(case / "tmp")
    try:
        yield
    finally:
        tempfile.tempdir = before


class TooLong(BaseException):
    """Nothing that handles errors handles it."""


@contextmanager
def _limits() -> Iterator[None]:
    """No more memory than so much beyond what this process has, and no more time."""

    def stop(*_: object) -> None:
        raise TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


_CHANGES = {
    "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),), "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, 0),),
}  # fmt: skip
"""Which arguments are a path, and the folder that it is relative to."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@contextmanager
def _watched(folder: Path) -> Iterator[list[Path]]:
    """The paths that Python makes, changes or removes, as they come."""
    written: list[Path] = []
    watching = [True]

    def note(event: str, args: tuple[object, ...]) -> None:
        if not watching[0]:
            return
        places = _CHANGES.get(event, ())
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
            places = ((0, 0),)
        for at, relative_to in places:
            path, place = args[at], args[relative_to]
            if isinstance(path, (str, bytes, os.PathLike)) and os.fspath(path) != os.devnull:
                inside = isinstance(place, int) and place >= 0
                root = Path(f"/proc/self/fd/{place}").readlink() if inside else Path.cwd()
                found = Path(os.path.normpath(root / os.fsdecode(path)))
                if event != "os.mkdir" or not found.exists():
                    written.append(found)

    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.addaudithook(note)  # there is no way to take it back
    try:
        yield written
    finally:
        watching[0] = False
        sys.dont_write_bytecode = before


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
