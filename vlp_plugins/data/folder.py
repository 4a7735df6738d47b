"""A folder of images with metadata, after the convention of `datasets`' ImageFolder.

Needs no other package. `file_name` is relative to the metadata file; splits are sub-folders that
have their own metadata, or the first part of the file names.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlp_plugins.data.images import read_image
from vlp_plugins.data.records import (
    CAPTION_COLUMNS,
    Captions,
    CaptionSource,
    Record,
    choose_column,
    choose_split,
    first_folders,
    split_among,
)
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.untrusted import check_inside

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


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    caption: object


class ImageFolder(CaptionSource):
    """Images named by a metadata file, in its order; without captions, all images by name."""

    def __init__(
        self,
        folder: Path,
        *,
        split: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        captions: Captions = "first",
    ) -> None:
        """Reads the metadata and makes sure that every file is there; decodes nothing.

        Raises:
            DataError: if the folder is empty, has no usable metadata, or files are missing.
        """
        super().__init__(str(folder) if split is None else f"{folder} ({split})", captions)
        if not any(folder.iterdir()):
            raise DataError(f"folder {folder} is empty; put images and metadata.jsonl into it")
        if captions == "none":
            self._entries, chosen = _all_images(folder, split)
        else:
            base, prefix = _locate(folder, split)
            self._entries, chosen = _entries(folder, base, prefix, image_column, caption_column)
            if base.parent != folder:
                chosen = base.parent.name
        if chosen is not None:
            self.description = f"{folder} ({chosen})"
        self.length = sum(_pairs_of(entry, captions) for entry in self._entries)

    def records(self, seed: int | None) -> Iterator[Record]:
        entries: Sequence[_Entry] = self._entries
        if seed is not None:
            entries = random.Random(seed).sample(entries, len(entries))
        for entry in entries:
            yield Record(entry.path.name, partial(read_image, entry.path), entry.caption)


def has_metadata(folder: Path) -> bool:
    """True if a folder or one of its sub-folders holds a metadata file."""
    return any(
        (place / name).is_file() for place in (folder, *_subfolders(folder))
        for name in METADATA_NAMES
    )  # fmt: skip


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, by name."""
    return sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _locate(folder: Path, split: str | None) -> tuple[Path, str | None]:
    """The metadata file to read, and the split that its file names must begin with."""
    here = find_metadata(folder)
    below = {sub.name: found for sub in _subfolders(folder) if (found := find_metadata(sub))}
    if here is not None and split not in below:
        return here, split
    if not below:
        count = len(image_files(folder))
        raise DataError(
            f"{folder} has no metadata.jsonl or metadata.csv ({count:,} images found); write one "
            'line for each image: {"file_name": "0001.png", "text": "a caption"}'
        )
    return below[choose_split(list(below), split, where=str(folder))], None


def _entries(
    folder: Path,
    metadata: Path,
    prefix: str | None,
    image_column: str | None,
    caption_column: str | None,
) -> tuple[list[_Entry], str | None]:
    """The entries of a metadata file, and the split that their names say."""
    rows = read_metadata(metadata)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    usual = [c for c in columns if c == "file_name"] + [c for c in columns if "_file_name" in c]
    file_column = image_column or next(iter(usual), "file_name")
    if file_column not in columns:
        raise DataError(
            f"{metadata} has no column {file_column!r} (its columns: "
            f"{', '.join(columns)}); it gives each image's path relative to {metadata.parent}"
        )
    caption_column = choose_column(
        columns, caption_column, CAPTION_COLUMNS, kind="caption", where=str(metadata)
    )
    pairs = [(_name(row, file_column, metadata), row.get(caption_column)) for row in rows]
    folders = first_folders(name for name, _ in pairs)
    prefix = split_among(folders, prefix, where=str(metadata.parent))
    if prefix is not None:
        pairs = [(name, caption) for name, caption in pairs if name.startswith(f"{prefix}/")]
    entries = [_Entry(metadata.parent / name, caption) for name, caption in pairs]
    for entry in entries:
        check_inside(entry.path, folder, metadata)
    missing = [name for (name, _), entry in zip(pairs, entries, strict=True)
               if not entry.path.is_file()]  # fmt: skip
    if missing:
        raise DataError(
            f"{metadata} names {len(missing):,} of {len(entries):,} images that do not exist "
            f"(first: {missing[0]}); add the files or remove their rows"
        )
    return entries, prefix


def _name(row: Row, column: str, metadata: Path) -> str:
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise DataError(f"{metadata}: a row has {column} {name!r}, not the name of a file: {row}")
    return name


def _all_images(folder: Path, split: str | None) -> tuple[list[_Entry], str | None]:
    """All images of a split, and which one that is."""
    names = [path.name for path in _subfolders(folder)]
    chosen = split_among(names, split, where=str(folder))
    root = folder if chosen is None else folder / chosen
    paths = image_files(root)
    if not paths:
        raise DataError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [_Entry(path, None) for path in paths], chosen


def _pairs_of(entry: _Entry, captions: Captions) -> int:
    several = captions == "all" and isinstance(entry.caption, list)
    return len(entry.caption) if several else 1  # type: ignore[arg-type]
