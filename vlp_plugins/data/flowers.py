"""Flowers-102 (Nilsback and Zisserman 2008) as published: two MATLAB files, a folder of JPEGs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from vlp_plugins.data.annotation_files import image_of, image_root
from vlp_plugins.data.columns import choose_split
from vlp_plugins.data.labelled import Labelled, LabelledImages
from vlp_plugins.runtime.errors import DataError, first_line
from vlp_plugins.runtime.untrusted import check_read

_LABELS, _SPLITS = "imagelabels.mat", "setid.mat"
_BYTES = 8  # of a number, at most
_IDS = {"train": "trnid", "val": "valid", "test": "tstid"}


def is_flowers(folder: Path) -> bool:
    """True if a folder holds one of the two MATLAB files."""
    return (folder / _LABELS).is_file() or (folder / _SPLITS).is_file()


def open_flowers(folder: Path, split: str | None = None) -> LabelledImages:
    """The images of one split: `imagelabels.mat`, `setid.mat`, `jpg/image_00001.jpg`, ...

    Args:
        folder: of the data set.
        split: `train`, `val` or `test`; None takes `train`.

    Raises:
        DataError: if files are missing or are not what they should be, or scipy is not installed.
    """
    missing = [name for name in (_LABELS, _SPLITS) if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} lacks {' and '.join(missing)}: Flowers-102 is {_LABELS}, {_SPLITS} and the "
            "folder jpg; put all of them there"
        )
    chosen = choose_split(list(_IDS), split, where=str(folder))
    labels = _numbers(folder / _LABELS, "labels")
    ids = _numbers(folder / _SPLITS, _IDS[chosen])
    if not len(ids) or ids.min() < 1 or ids.max() > len(labels):
        raise DataError(
            f"{folder / _SPLITS} numbers images of split {chosen} outside 1 to {len(labels):,}, "
            f"the number of labels in {_LABELS}; both must be of the same data set"
        )
    names = [f"image_{number:05}.jpg" for number in ids]
    root = image_root(folder, names, ("jpg",), folder / _SPLITS)
    items = tuple(
        Labelled(name, image_of(root / name), int(labels[number - 1]) - 1)
        for name, number in zip(names, ids, strict=True)
    )
    return LabelledImages(f"{folder} ({chosen})", items)


def _numbers(path: Path, key: str) -> np.ndarray:
    """A row of integers of a MATLAB file, `[n]`."""
    try:
        from scipy.io import loadmat, whosmat
    except ImportError as error:
        raise DataError(
            f'{path} is a MATLAB file, which scipy reads: pip install "vlp-plugins[eval]"'
        ) from error
    try:
        for name, shape, _ in whosmat(str(path)):
            check_read(f"{path}: {name}", math.prod(shape) * _BYTES, DataError)
        content: dict[str, Any] = loadmat(str(path))
    except DataError:
        raise
    except Exception as error:  # damaged files raise what the parser raises
        raise DataError(
            f"{path} is damaged or no MATLAB file: {first_line(error)}; fetch it again"
        ) from error
    if key not in content:
        found = ", ".join(name for name in content if not name.startswith("__"))
        raise DataError(f"{path} has no {key!r} (it has: {found or 'nothing'})")
    return np.asarray(content[key]).astype(np.int64).reshape(-1)
