"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), the binary version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vlp_plugins.data.annotation_files import contents
from vlp_plugins.data.columns import choose_split
from vlp_plugins.data.labelled import Labelled, LabelledImages
from vlp_plugins.runtime.errors import DataError

_SIDE, _CHANNELS = 32, 3
_PIXELS = _SIDE * _SIDE * _CHANNELS


@dataclass(frozen=True)
class _Layout:
    """Files of one of the two data sets.

    Attributes:
        folder: that the archive unpacks to.
        splits: files of each.
        labels: bytes before the pixels of an image; the last is the class.
        names: file with the names of the classes.
    """

    folder: str
    splits: dict[str, tuple[str, ...]]
    labels: int
    names: str


_CIFAR_10 = _Layout(
    "cifar-10-batches-bin",
    {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)},
    1,
    "batches.meta.txt",
)
_CIFAR_100 = _Layout(
    "cifar-100-binary",
    {"train": ("train.bin",), "test": ("test.bin",)},
    2,
    "fine_label_names.txt",
)
_PICKLED = {"cifar-10-batches-py": _CIFAR_10, "cifar-100-python": _CIFAR_100}


def is_cifar(folder: Path) -> bool:
    """True for the folder of a CIFAR data set, one that holds it, or the pickled version of it."""
    return _find(folder) is not None or _pickled(folder) is not None


def open_cifar(folder: Path, split: str | None = None) -> LabelledImages:
    """The images of one split: `cifar-10-batches-bin/` or `cifar-100-binary/` (the 100 classes).

    Args:
        folder: it, or the folder that it is in.
        split: `train` or `test`; None takes `train`.

    Raises:
        DataError: if files are missing or cut off, or the folder holds the Python version, whose
            pickles could run code and are not read.
    """
    found = _find(folder)
    if found is None:
        known = _pickled(folder)
        if known is not None:
            raise DataError(
                f"{folder} holds the Python version of CIFAR, which is pickles: they can run code, "
                f"so they are not read; take the binary version ({known.folder}), or parquet "
                "files, which `datasets` reads"
            )
        raise DataError(
            f"{folder} holds no CIFAR: expected {_CIFAR_10.folder} or {_CIFAR_100.folder}, found "
            f"{contents(folder)}"
        )
    place, layout = found
    chosen = choose_split(list(layout.splits), split, where=str(place))
    items = [item for name in layout.splits[chosen] for item in _items(place / name, layout)]
    return LabelledImages(f"{place} ({chosen})", tuple(items), _names(place / layout.names))


def _find(folder: Path) -> tuple[Path, _Layout] | None:
    for layout in (_CIFAR_10, _CIFAR_100):
        for place in (folder, folder / layout.folder):
            files = (name for names in layout.splits.values() for name in names)
            if any((place / name).is_file() for name in files):
                return place, layout
    return None


def _pickled(folder: Path) -> _Layout | None:
    for name, layout in _PICKLED.items():
        if folder.name == name or (folder / name).is_dir():
            return layout
    return None


def _items(path: Path, layout: _Layout) -> list[Labelled]:
    if not path.is_file():
        raise DataError(f"{path} is missing; the folder should hold {_files(layout)}")
    size = layout.labels + _PIXELS
    total = path.stat().st_size
    if not total or total % size:
        raise DataError(
            f"{path} has {total:,} bytes, which is no multiple of the {size:,} of an image: it is "
            "cut off or no CIFAR file; unpack the archive again"
        )
    rows = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, size)
    return [
        Labelled(f"{path.name}, image {number}", _opener(rows, number, layout), int(label))
        for number, label in enumerate(rows[:, layout.labels - 1])
    ]


def _opener(rows: np.ndarray, number: int, layout: _Layout) -> Callable[[], Image.Image]:
    return partial(_image, rows, number, layout.labels)


def _image(rows: np.ndarray, number: int, labels: int) -> Image.Image:
    planes = np.asarray(rows[number, labels:]).reshape(_CHANNELS, _SIDE, _SIDE)
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def _names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    return tuple(path.read_text(encoding="utf-8").split())


def _files(layout: _Layout) -> str:
    return ", ".join(name for names in layout.splits.values() for name in names)
