"""Reads `metadata.jsonl` and `metadata.csv` of an image folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from vlp_plugins.data.columns import first_folders, split_among
from vlp_plugins.runtime.errors import DataError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")

Row = dict[str, object]


def find_metadata(folder: Path) -> Path | None:
    """The metadata file in a folder; None if there is none.

    Raises:
        DataError: if there are two.
    """
    found = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} holds metadata.jsonl and metadata.csv; remove one of them")
    return found[0] if found else None


def read_metadata(path: Path, *, lines: bool = False) -> list[Row]:
    """The rows of a metadata file; blank lines are passed over.

    Args:
        path: `.jsonl` has one JSON object a line, all others are read as CSV.
        lines: one JSON object a line, whatever the file is called.

    Raises:
        DataError: if it cannot be read, with the line at fault.
    """
    try:
        rows = _read_jsonl(path) if lines or path.suffix == ".jsonl" else _read_csv(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save it in that encoding") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{path} has no rows; write one for each image")
    return rows


def rows_of_split(
    rows: list[Row], column: str, split: str | None, path: Path
) -> tuple[list[Row], str | None]:
    """The rows of one split, where the names of files begin with folders of splits.

    Args:
        rows: of the metadata file.
        column: that holds the names.
        split: that is asked for; None takes `train` of several.
        path: the metadata file, for messages.

    Returns:
        The rows, and the split; all rows and None if there are no splits.

    Raises:
        DataError: see `choose_split`.
    """
    names = [str(row[column]) for row in rows]
    chosen = split_among(first_folders(names), split, where=str(path.parent))
    if chosen is None:
        return rows, None
    return [
        row for row, name in zip(rows, names, strict=True) if name.startswith(f"{chosen}/")
    ], chosen


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise DataError(f"{path}, line {number}: not JSON ({reason})") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: {line.strip()[:40]!r} is no JSON object such as "
                    '{"file_name": "0001.png", "text": "a caption"}'
                )
            rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path}, line {reader.line_num}: more fields than the header names; "
                        "put captions that contain commas in double quotes"
                    )
                rows.append(dict(row))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    return rows
