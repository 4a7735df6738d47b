"""Files and folders that appear whole or not at all.

They are written under a temporary name next to the target, synced to the disk and renamed. If
anything goes wrong meanwhile, an exception or Ctrl-C, the temporary is removed and the target is
untouched. After `kill -9` a file named `.unfinished-*` may stay, which the next run there removes;
the target is untouched then, too.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.numbers import size

try:
    import fcntl
except ImportError:  # not on this system; runs are then not kept apart
    fcntl = None  # type: ignore[assignment]

_LOCK = b"Held by a run of vlp that has not ended.\n"
_TEMPORARY = re.compile(r"\.unfinished-([0-9a-f]{6})-(\d+)-[0-9a-f]{8}(\.\w+)?")
_BEGINNING = 4096  # bytes
_RESULT = re.compile(
    r"(masks|model-.*)/|[^.].*\.(safetensors|json|jsonl|csv|html|yaml)"
    r"|(tokenizer|vocab|merges).*|chat_template.*"
)
"""Names in folders of results and models; `/` ends that of a folder."""
_REPLACING = "--overwrite (in Python: overwrite=True)"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STORAGE = {*_FULL, errno.EROFS, errno.EIO}
# Libraries that write from C++ or Rust report the operating system's error as text only.
_FOREIGN_FAILURE = re.compile(r"\(os error (\d+)\)|PytorchStreamWriter|unexpected pos \d+ vs")


@contextmanager
def atomic_file(
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    own: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Gives a temporary path to write to; it becomes `target` when the block ends well.

    Folders that are missing above the target are made.

    Args:
        target: the file. A symbolic link is followed, not replaced.
        overwrite: replace an existing file; nothing else than a regular file is ever replaced.
        own: recognises the files that may be replaced; see `check_own`.

    Raises:
        OutputError: if the target exists, or if it cannot be written (disk full, no permission).
    """
    if own is None:
        target = _real(target)
    else:
        overwrite, target = True, _real(Path(target).parent) / Path(target).name
        check_own(target, own)
    # The suffix stays, for libraries that choose a format by it; torch.save cannot do without one.
    suffix = target.suffix or ".tmp"
    temporary = temporary_path(target, suffix)
    with _cleaned_up(temporary, target):
        check_new(target, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        check_new(target, overwrite=overwrite)  # another process may have made it meanwhile
        temporary.replace(target)
        _sync_folder(target.parent)


@contextmanager
def atomic_folder(
    target: str | os.PathLike[str], *, mark: str | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """Gives a temporary folder to fill; it becomes `target` when the block ends well.

    Args:
        target: the folder. A symbolic link is followed, not replaced.
        mark: name of a file that tells the folders that may be replaced; None: none may.
        overwrite: replace such a folder, with all that is in it.

    Raises:
        OutputError: if the target exists (an empty folder may), or if it cannot be written.
    """
    target = _real(target)
    temporary = temporary_path(target)
    with _cleaned_up(temporary, target):
        check_new_folder(target, mark=mark, overwrite=overwrite)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        check_new_folder(target, mark=mark, overwrite=overwrite)
        if target.exists() and any(target.iterdir()):
            _replace(target, temporary)
        else:
            if target.exists():
                target.rmdir()  # it is empty; only POSIX renames onto an empty folder
            temporary.rename(target)
        _sync_folder(target.parent)


def write_text(
    target: str | os.PathLike[str],
    text: str,
    *,
    overwrite: bool = False,
    own: Callable[[Path], bool] | None = None,
) -> None:
    """Writes a whole file in UTF-8, line ends as given; see `atomic_file`."""
    with atomic_file(target, overwrite=overwrite, own=own) as temporary:
        temporary.write_bytes(text.encode())


def append_text(target: Path, text: str) -> None:
    """Appends to a file, and makes it if it is not there; on the disk when this returns.

    Raises:
        OutputError: if it is a link, which is not followed, or cannot be written.
    """
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(target, flags, 0o666), "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def check_own(target: Path, own: Callable[[Path], bool]) -> None:
    """Checks that a file which a run keeps its state in replaces nothing but such a file.

    Args:
        target: of the state.
        own: whether a regular file was written by an earlier run.

    Raises:
        OutputError: if something else is there, or a link.
    """
    if target.is_symlink():
        raise OutputError(
            f"{target} is a link, and a run keeps its state there; no link is followed: remove "
            "it, or give another place"
        )
    if target.exists() and not (target.is_file() and own(target)):
        raise OutputError(
            f"{target} is where a run keeps its state, but no run wrote what is there; move it "
            "away, or give another place"
        )


def check_new(target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Asks before the work whether `atomic_file` would accept a target.

    Raises:
        OutputError: if the target exists and is not to be, or cannot be, replaced.
    """
    target = Path(target)
    if not target.exists():
        return
    if not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise OutputError(f"{target} is {kind}; give the path of a file")
    if not overwrite:
        raise OutputError(
            f"{target} exists already; give another path, or replace it with {_REPLACING}"
        )


def check_new_folder(
    target: str | os.PathLike[str], *, mark: str | None = None, overwrite: bool = False
) -> None:
    """Asks before the work whether `atomic_folder` would accept a target.

    Raises:
        OutputError: if the target is a file, or a folder with something in it that is not to be,
            or cannot be, replaced.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; give the path of a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if mark is None or not overwrite:
        more = "" if mark is None else f", or replace it with {_REPLACING}"
        raise OutputError(f"folder {target} exists and is not empty; give another one{more}")
    if not _has_mark(target, mark):
        raise OutputError(
            f"folder {target} is not empty and has no {mark} of vlp_plugins in it, so that it is "
            "not one to be overwritten; give another one, or delete it yourself"
        )
    if stranger := _stranger(target):
        raise OutputError(
            f"folder {target} holds {stranger}, which vlp_plugins did not write and which would be "
            "deleted with the rest; give another folder, or take it out"
        )


def _has_mark(folder: Path, mark: str) -> bool:
    """Whether a folder has the file, and we wrote it: all our files say so at their beginning."""
    path = folder / mark
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING)
    # A recipe that someone else wrote, such as one of `vlp init`, may name modules of ours.
    words = b"Written by vlp_plugins" if path.suffix == ".yaml" else b"vlp_plugins"
    return words in beginning


def _stranger(folder: Path) -> str | None:
    """Something in a folder whose name no result has, such as data, a repository, notes."""
    names = (f"{path.name}/" if path.is_dir() else path.name for path in sorted(folder.iterdir()))
    return next((name for name in names if not _RESULT.fullmatch(name)), None)


def _replace(target: Path, new: Path) -> None:
    """Puts a folder in the place of another, which is there until the new one is whole."""
    # Not a name that `remove_abandoned` knows: after a crash it may be the only copy.
    old = target.with_name(f"{_replaced(target)}{secrets.token_hex(4)}")
    try:
        target.rename(old)
        new.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise OutputError(f"cannot replace {target}: {error.strerror}; it is as before") from error
    shutil.rmtree(old, ignore_errors=True)


def _replaced(target: Path) -> str:
    """How the names begin under which `_replace` moves a folder out of the way."""
    return f".replaced-{target.name}-"


def _recover(target: Path) -> None:
    """Ends what a killed `_replace` began: brings the old folder back, or deletes it."""
    for old in target.parent.iterdir():
        if old.name.startswith(_replaced(target)) and old.is_dir() and not old.is_symlink():
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(target)


def check_space(target: str | os.PathLike[str], needed: int) -> None:
    """Asks before the work whether a disk has room for what will be written.

    Args:
        target: that will be written; need not exist.
        needed: bytes.

    Raises:
        OutputError: if there is less.
    """
    place = next(path for path in (_real(target), *_real(target).parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"{target} will take {size(needed)}, and its disk has {size(free)} left; free "
            "some, or give a place on another disk"
        )


def check_outside(target: str | os.PathLike[str], inputs: Iterable[object]) -> None:
    """Checks that a folder which may be replaced holds nothing that the run reads.

    Args:
        target: the folder of results.
        inputs: paths; anything else among them, or that does not exist, is passed over.

    Raises:
        OutputError: naming the first input that is the folder or lies in it.
    """
    folder = _real(target)
    for given in inputs:
        if isinstance(given, (str, os.PathLike)) and given:
            path = Path(given).expanduser()
            if path.exists() and path.resolve().is_relative_to(folder):
                raise OutputError(
                    f"{given} is read by this run and lies in {target}, which --overwrite would "
                    "replace with all that is in it; give another --out"
                )


def temporary_path(target: Path, suffix: str = "") -> Path:
    """A new name next to `target` that tells which process writes there."""
    return target.with_name(
        f".unfinished-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"
    )


def remove_abandoned(folder: Path) -> None:
    """Removes temporaries in a folder whose process on this machine has ended."""
    for path in folder.glob(".unfinished-*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or match[1] != _machine() or _runs(int(match[2])) or path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


@contextmanager
def reserved(target: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other runs from a target, and what belongs to it, until the block ends.

    A lock file `TARGET.lock` next to it is held; the system frees it when the process dies. What
    killed runs left unfinished there is removed.

    Raises:
        OutputError: if another run holds the lock, or the file is not ours or cannot be made.
    """
    target = _real(target)
    path = target.with_name(f"{target.name}.lock")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, target)
    except OSError as error:
        reason = _failure(error, path, target) or error.strerror or str(error)
        raise OutputError(f"cannot write {target}: {reason}; nothing was written") from error
    try:
        _recover(target)
        remove_abandoned(path.parent)
        yield
    finally:
        if os.pread(descriptor, len(_LOCK), 0) == _LOCK:
            path.unlink(missing_ok=True)  # while it is held: the next run makes a new one
        os.close(descriptor)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()  # stays if something was written there


def _locked(path: Path, target: Path) -> int:
    """An open descriptor of the lock file, which holds the lock until it is closed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _lock(descriptor)
            content = os.pread(descriptor, len(_LOCK) + 1, 0)
            if content not in (b"", _LOCK):
                raise OutputError(
                    f"{path} is where a run says that it writes {target}, but it is some other "
                    "file; move it away, or give another --out"
                )
            current = path.lstat() if path.exists() else None
            if current is not None and os.path.samestat(os.fstat(descriptor), current):
                os.pwrite(descriptor, _LOCK, 0)
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(
                f"another run is writing {target} (it holds {path}); wait for it, or give another "
                "path"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another run ended and removed the file meanwhile


def _lock(descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # runs are then not kept apart
            raise


def _runs(process: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@cache
def _machine() -> str:
    """A name of this machine, or container, among those that may share a disk."""
    link = Path("/proc/self/ns/pid")
    space = str(link.readlink()) if link.is_symlink() else ""
    return hashlib.sha256(f"{socket.gethostname()}|{space}".encode()).hexdigest()[:6]


@contextmanager
def _cleaned_up(temporary: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if reason := _failure(error, temporary, target):
            raise OutputError(f"cannot write {target}: {reason}; nothing was written") from error
        raise


def _failure(error: BaseException, temporary: Path, target: Path) -> str | None:
    """Why the target could not be written; None if the error is about something else."""
    where = ""
    if isinstance(error, OSError):
        number = error.errno
        if not _concerns(error.filename, temporary, target) and number not in _STORAGE:
            return None
        if error.filename and Path(error.filename) in target.parents:
            where = f" ({error.filename})"
    elif found := _FOREIGN_FAILURE.search(str(error)):
        # torch does not say why; a full disk is the common reason.
        number = int(found[1]) if found[1] else errno.ENOSPC
        if number not in _STORAGE:
            return None
    else:
        return None
    if number in _FULL:
        return "no space left on the disk (or a quota is used up); free some or write elsewhere"
    return f"{os.strerror(number) if number else error}{where}"


def _concerns(filename: object, temporary: Path, target: Path) -> bool:
    """True if an error's file is the temporary, in it, the target or a folder above."""
    if not isinstance(filename, str | os.PathLike):
        return False
    path = Path(filename)
    return path == target or path in target.parents or path.is_relative_to(temporary)


def _real(target: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(target))


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the system lets one open a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
