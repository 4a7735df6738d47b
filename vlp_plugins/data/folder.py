"""A folder of images with metadata, after the convention of `datasets`' ImageFolder.

Needs no other package. `file_name` is relative to the metadata file; splits are sub-folders that
have their own metadata, or the first part of the file names.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from vlp_plugins.data.annotations import image_of
from vlp_plugins.data.images import check_no_video
from vlp_plugins.data.records import (
    IMAGE_COLUMNS,
    Captions,
    CaptionSource,
    Record,
    RecordList,
    choose_split,
    columns_said,
    said_in,
    split_among,
    with_split,
)
from vlp_plugins.runtime.errors import DataError, first_line, shown
from vlp_plugins.runtime.untrusted import check_inside, is_file

METADATA_SUFFIXES = (".jsonl", ".csv")

_FILE_COLUMNS = ("file_name", "filename", "file", "path", "image_path", *IMAGE_COLUMNS)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

Row = dict[str, object]


def find_metadata(folder: Path) -> Path | None:
    """The metadata file in a folder, or the only table next to images; None if there is none.

    Raises:
        DataError: if there are two metadata files.
    """
    names = (f"metadata{suffix}" for suffix in METADATA_SUFFIXES)
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} holds metadata.jsonl and metadata.csv; remove one of them")
    if not found:  # captions.csv, say
        files = list(folder.iterdir())
        if any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
            found = [path for path in files if path.suffix.lower() in METADATA_SUFFIXES]
    return found[0] if len(found) == 1 else None


def read_metadata(path: Path, *, lines: bool = False) -> list[Row]:
    """The rows of a metadata file; blank lines are left out.

    `.jsonl`, or any file if it has `lines`, has one JSON object per line; all others are read as
    CSV.

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


def file_column(columns: Iterable[str]) -> str:
    """The column with the file names of images, of those with a usual name; else `file_name`."""
    names = {column.lower(): column for column in columns}
    marked = [name for name in names if "_file_name" in name]
    known = (_FILE_COLUMNS[0], *marked, *_FILE_COLUMNS[1:])
    return next((names[name] for name in known if name in names), _FILE_COLUMNS[0])


def find_split(folder: Path, split: str | None) -> tuple[Path, str | None] | None:
    """The metadata file of a split, and the folder that its file names must begin with, if any.

    A sub-folder with metadata of its own comes first. None if no file can hold the split.

    Raises:
        DataError: if no split is asked for among several without `train`.
    """
    here = find_metadata(folder)
    below = _metadata_below(folder)
    if here is not None and split not in below:
        return here, split
    if not below or split not in (None, *below):
        return None
    return below[choose_split(list(below), split, where=str(folder))], None


def rows_of_split(
    rows: list[Row], column: str, split: str | None, path: Path, folder: Path
) -> tuple[list[Row], str | None]:
    """The rows of a split, where the file names in `column` begin with the folder of a split.

    Args:
        rows: of the metadata file at `path`.
        column: of the file names.
        split: see `find_split`.
        path: in the folder of the data, or in that of a split below it.
        folder: that of the data.

    Returns:
        The rows, and the split (`train` if none is asked for); all rows and None without splits.

    Raises:
        DataError: see `choose_split`.
    """
    names = [str(row[column]) for row in rows]
    folders = (name.split("/", 1)[0] for name in names if "/" in name)
    chosen = split_among(folders, split, where=str(path.parent))
    if chosen is not None:
        rows = [r for r, n in zip(rows, names, strict=True) if n.startswith(f"{chosen}/")]
    return rows, chosen if path.parent == folder else path.parent.name


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or first_line(error)
                raise DataError(f"{path}, line {number}: not JSON ({reason})") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: {line.strip()[:40]!r} is not a JSON object such as "
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


def open_folder(
    folder: Path,
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    captions: Captions = "first",
) -> CaptionSource:
    """Images that a metadata file names, in its order; without captions, all images by name.

    Every file must be there; none is decoded.

    Raises:
        DataError: if the folder is empty, has no usable metadata, or files are missing.
    """
    if not any(folder.iterdir()):
        raise DataError(f"folder {folder} is empty; put images and metadata.jsonl into it")
    if captions == "none":
        records, chosen = _all_images(folder, split)
    else:
        metadata, prefix = _locate(folder, split)
        records, chosen = _records(folder, metadata, prefix, image_column, caption_column, captions)
    return RecordList(records, with_split(folder, chosen or split), captions)


def has_metadata(folder: Path) -> bool:
    """True if a folder or one of its sub-folders holds a metadata file."""
    return any(find_metadata(place) for place in (folder, *subfolders(folder)))


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, by name."""
    return sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
    )


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _check_no_videos(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        check_no_video(path)


def _metadata_below(folder: Path) -> dict[str, Path]:
    return {sub.name: found for sub in subfolders(folder) if (found := find_metadata(sub))}


def _locate(folder: Path, split: str | None) -> tuple[Path, str | None]:
    """`find_split`, or an error that says what the folder has."""
    found = find_split(folder, split)
    if found is None and (below := _metadata_below(folder)):
        choose_split(list(below), split, where=str(folder))
    if found is None:
        if not (images := image_files(folder)):
            _check_no_videos(folder)
        raise DataError(
            f"{folder} has no metadata.jsonl or metadata.csv ({len(images):,} images "
            'found); write one line for each image: {"file_name": "0001.png", "text": "a caption"}'
        )
    return found


def _records(
    folder: Path,
    metadata: Path,
    split: str | None,
    image_column: str | None,
    caption_column: str | None,
    captions: Captions,
) -> tuple[list[Record], str | None]:
    """The records of a metadata file, and the split that their names begin with."""
    rows = read_metadata(metadata)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names = image_column or file_column(columns)
    if names not in columns:
        raise DataError(
            f"{metadata} has no column {names!r} (its columns: {', '.join(columns)}), which gives "
            f"each image's path relative to {metadata.parent}; name the column that does with "
            "image_column (--image-column)"
        )
    said = columns_said(columns, caption_column, captions, where=str(metadata))
    for row in rows:
        name = row.get(names)
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{metadata}: a row has {names} {shown(name)}, not the name of a file: {shown(row)}"
            )
    rows, split = rows_of_split(rows, names, split, metadata, folder)
    paths = [metadata.parent / str(row[names]) for row in rows]
    for path in paths:
        check_inside(path, folder, metadata)
    missing = [row[names] for row, path in zip(rows, paths, strict=True)
               if not is_file(path)]  # fmt: skip
    if missing:
        raise DataError(
            f"{metadata} names {len(missing):,} of {len(rows):,} images that do not exist "
            f"(first: {missing[0]:.300}); add the files or remove their rows"
        )
    return [
        Record(path.name, image_of(path), said_in(row, said, images=1))
        for row, path in zip(rows, paths, strict=True)
    ], split


def _all_images(folder: Path, split: str | None) -> tuple[list[Record], str | None]:
    """All images of a split, and which one that is."""
    names = [path.name for path in subfolders(folder)]
    chosen = split_among(names, split, where=str(folder))
    root = folder if chosen is None else folder / chosen
    paths = image_files(root)
    if not paths:
        _check_no_videos(root)
        raise DataError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [Record(path.name, image_of(path), None) for path in paths], chosen
