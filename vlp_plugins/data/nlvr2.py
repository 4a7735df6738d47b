"""NLVR2 (Suhr et al. 2019): is a sentence true of two photographs?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlp_plugins.data.annotations import (
    Text,
    beginning,
    contents,
    image_of,
    image_root,
    need_keys,
    read_rows,
)
from vlp_plugins.data.folder import read_metadata
from vlp_plugins.data.records import Record, RecordList, Sample, choose_split
from vlp_plugins.runtime.errors import DataError, shown

_TRUTH = {"True": True, "False": False, "true": True, "false": False}
_SPLITS = ("train", "dev", "test")
_BELOW = ("images", "images/train", "images/dev", "images/test1")


def open_nlvr2(folder: Path, split: str = "dev") -> list[Sample]:
    """The statements of a split: `train`, `dev`, `test` (the public one, `test1.json`), ...

    Each is about a left image and a right one, its `second`.

    - as published: `dev.json` (one JSON object per line; also in `data/`), images
      `dev/dev-850-0-img0.png`; those of `train.json` in `images/train/{directory}/`;
    - the lists of BLIP's and X-VLM's: `nlvr_dev.json`, `nlvr2_dev.json`, whose rows name both
      images. Rows of `dev.json` may name them as well: `"images": ["left.png", "right.png"]`.

    Raises:
        DataError: if files are missing or are not what they should be.
    """
    path = _file_of(folder, split)
    if path is None:
        raise DataError(
            f"{folder} holds no split {split!r} of NLVR2: expected {' or '.join(_names(split))} "
            f"there or in data/, found {contents(folder)}"
        )
    rows: Sequence[Mapping[str, Any]]
    rows = read_rows(path) if path.name.startswith("nlvr") else read_metadata(path, lines=True)
    pairs = [_images_of(row, path) for row in rows]
    root = image_root(folder, [name for pair in pairs for name in pair], _BELOW, path)
    return [
        Sample(
            str(row.get("identifier", f"row {number}")),
            image_of(root / left),
            (str(need_keys(row, {"sentence": Text}, path)[0]),),
            label=int(_truth(row, path)),
            second=image_of(root / right),
        )
        for number, (row, (left, right)) in enumerate(zip(rows, pairs, strict=True), 1)
    ]


def statement_source(folder: Path, split: str | None) -> RecordList:
    """The statements of a split in place of captions, each with two images.

    Raises:
        DataError: see `open_nlvr2` and `nlvr2_split`.
    """
    chosen = nlvr2_split(folder, split)
    records = [
        Record(item.place, partial(_both, item), item) for item in open_nlvr2(folder, chosen)
    ]
    return RecordList(records, f"{folder} ({chosen})", "statements")


def _both(statement: Sample) -> list[Image.Image]:
    opened = (statement.image, statement.second)
    return [image() for image in opened if image is not None]


def has_statements(path: Path) -> bool:
    """True for a folder with a list of statements that are true or false."""
    if not path.is_dir():
        return False
    files = filter(None, (_file_of(path, split) for split in _SPLITS))
    return any('"sentence"' in text and '"label"' in text for text in map(beginning, files))


def nlvr2_split(folder: Path, split: str | None) -> str:
    """The split that is asked for; of None the only one, or `train`.

    Raises:
        DataError: if there is no folder, or no split in it.
    """
    if not folder.is_dir():
        raise DataError(f"folder {folder} does not exist; check the path")
    if split is not None:
        return split
    available = [name for name in _SPLITS if _file_of(folder, name) is not None]
    if not available:
        raise DataError(
            f"{folder} holds no statements about two images: expected dev.json, in lines with "
            f"sentence, label and images, there or in data/, found {contents(folder)}"
        )
    return choose_split(available, None, where=str(folder))


def _names(split: str) -> list[str]:
    return [f"{split}.json", f"{split}1.json", f"nlvr_{split}.json", f"nlvr2_{split}.json"]


def _file_of(folder: Path, split: str) -> Path | None:
    places = (folder / below / n for n in _names(split) for below in ("", "data", "annotations"))
    return next((place for place in places if place.is_file()), None)


def _images_of(row: Mapping[str, Any], path: Path) -> tuple[str, str]:
    if "images" in row:
        images: tuple[str, str] = need_keys(row, {"images": tuple[str, str]}, path)[0]
        return images
    (identifier,) = need_keys(row, {"identifier": str}, path)
    parts = identifier.rsplit("-", 1)  # dev-850-0-0: set, pair and statement
    base = parts[0]
    directory = f"{row['directory']}/" if "directory" in row else f"{base.split('-', 1)[0]}/"
    return f"{directory}{base}-img0.png", f"{directory}{base}-img1.png"


def _truth(row: Mapping[str, Any], path: Path) -> bool:
    (label,) = need_keys(row, {"label": Text | bool}, path)
    truth = _TRUTH.get(str(label))
    if truth is None:
        raise DataError(f"{path}: the label {shown(label)} is neither True nor False")
    return truth
