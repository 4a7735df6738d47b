"""A results folder that a later run may replace, and nothing in it that is somebody else's.

New files are written to a temporary folder inside and moved when all are there. A list in the
folder tells which files are ours; a file under one of our names that it does not list is never
touched, and the run refuses to start.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath

from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.files import write_text

LISTING = ".files.json"
_MADE_BY = "benchmarks.demo"
_SCHEMA = 1


@contextmanager
def replacing(out: Path, names: Sequence[str]) -> Iterator[Path]:
    """Gives a temporary folder to fill; its files replace those of an earlier run in `out`.

    If the block fails, `out` is as it was. If the moving itself is interrupted, `out` holds old
    and new files and the next run replaces both.

    Args:
        out: made if missing.
        names: of the files and folders at the top of `out` that the block writes.

    Raises:
        OutputError: if `out` is a file, or holds files under these names that we did not make.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder")
    check_own(out, names)
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".unfinished-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        check_own(out, names)  # somebody may have put something there meanwhile
        _move(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def check_own(out: Path, names: Sequence[str]) -> None:
    """Makes sure that `out` holds no file of somebody else under our names.

    Raises:
        OutputError: names the first such file.
    """
    ours = listed(out)
    for name in names:
        top = out / name
        for path in (top, *sorted(top.rglob("*"))) if top.is_dir() else (top,):
            is_file = path.is_symlink() or path.is_file()
            if is_file and path.relative_to(out).as_posix() not in ours:
                raise OutputError(
                    f"{path} was not made by an earlier run, and it stands where this run would "
                    "write; move it away, or give another folder with --out"
                )


def listed(out: Path) -> set[str]:
    """The files that earlier runs made, relative to `out`; none if it has no list.

    Raises:
        OutputError: if the list cannot be understood.
    """
    path = out / LISTING
    if not path.exists():
        return set()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["made_by"], content["schema"]) != (_MADE_BY, _SCHEMA):
            raise ValueError(f"made by {content['made_by']}, schema {content['schema']}")
        files = {str(name) for name in content["files"]}
        if outside := [n for n in files if PurePath(n).is_absolute() or ".." in PurePath(n).parts]:
            raise ValueError(f"names {outside[0]}, outside of the folder")
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is damaged ({error}); give another folder with --out, or remove {out} if you "
            "do not need it"
        ) from error
    return files


def _move(source: Path, out: Path) -> None:
    old = listed(out)
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    _list(out, old | files)  # listed before they are there, so that no crash leaves strangers
    for name in sorted(files):
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target)
    for name in sorted(old - files):
        (out / name).unlink(missing_ok=True)
        for folder in (out / name).parents:
            if folder == out or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()
    _list(out, files)


def _list(out: Path, files: set[str]) -> None:
    content = {"made_by": _MADE_BY, "schema": _SCHEMA, "files": sorted(files)}
    write_text(out / LISTING, json.dumps(content, indent=0) + "\n", overwrite=True)
