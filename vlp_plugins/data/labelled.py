"""Images with a class each: CIFAR, Flowers-102, folders of classes, and what `datasets` reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlp_plugins.data.annotations import contents, image_of, image_root
from vlp_plugins.data.folder import find_metadata, image_files, read_metadata, rows_of_split
from vlp_plugins.data.records import choose_split
from vlp_plugins.runtime.errors import DataError, first_line
from vlp_plugins.runtime.untrusted import check_read

LABEL_COLUMNS = ("label", "fine_label", "labels", "class", "target")


@dataclass(frozen=True, slots=True)
class Labelled:
    """An image with its class.

    Attributes:
        place: where it is, for messages.
        image: opens the image.
        label: number of the class, from 0.
    """

    place: str
    image: Callable[[], Image.Image]
    label: int


@dataclass(frozen=True)
class LabelledImages:
    """The images of one split.

    Attributes:
        description: what was read.
        items: in stored order.
        classes: names of the classes by their number; empty if unknown.
    """

    description: str
    items: Iterable[Labelled]
    classes: tuple[str, ...] = ()


def open_labelled(source: str, split: str | None = None) -> LabelledImages:
    """Opens images with classes.

    - CIFAR-10 and CIFAR-100, the binary version: see `open_cifar`;
    - Flowers-102: see `open_flowers`;
    - a folder with `metadata.jsonl` or `.csv` of `file_name` and `label` (a number, or a name:
      names are numbered in alphabetical order), or with one such sub-folder per split;
    - a folder with one sub-folder of images per class, numbered in alphabetical order, perhaps
      below one folder per split;
    - anything that `datasets` reads (extra `data`) with a column of labels.

    Args:
        source: the folder, file or id.
        split: `train`, `test`, ...; None takes the only one, or `train`.

    Raises:
        DataError: if it is nothing of these, or files are missing.
    """
    from vlp_plugins.data.hub import FILE_BUILDERS, is_saved

    folder = Path(source).expanduser()
    if not folder.is_dir():
        return _from_datasets(source, split)
    if is_cifar(folder):
        return open_cifar(folder, split)
    if is_flowers(folder):
        return open_flowers(folder, split)
    place, title = _split_folder(folder, split)
    metadata = find_metadata(place)
    if metadata is not None:
        return _from_metadata(metadata, title, split if place == folder else None)
    files = {path.suffix.lower() for path in folder.rglob("*")}
    if is_saved(folder) or files & FILE_BUILDERS.keys():
        return _from_datasets(source, split)
    return _from_classes(place, title)


def _split_folder(folder: Path, split: str | None) -> tuple[Path, str]:
    """Where the split lies; the folder itself if it has no splits."""
    whole = find_metadata(folder)
    if whole is not None and (split is None or find_metadata(folder / split) is None):
        return folder, str(folder)
    if split is not None and (folder / split).is_dir():
        return folder / split, f"{folder} ({split})"
    below = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    splits = [path.name for path in below if find_metadata(path) is not None]
    if not splits:  # splits hold folders of classes, not images
        splits = [
            path.name for path in below
            if any(inner.is_dir() and image_files(inner) for inner in path.iterdir())
        ]  # fmt: skip
    if splits:
        chosen = choose_split(splits, split, where=str(folder))
        return folder / chosen, f"{folder} ({chosen})"
    if split is not None:
        raise DataError(f"{folder} has no split {split!r}; it holds {contents(folder)}")
    return folder, str(folder)


def _from_metadata(path: Path, title: str, split: str | None) -> LabelledImages:
    rows = read_metadata(path)
    column = next((name for name in LABEL_COLUMNS if name in rows[0]), None)
    if column is None or any("file_name" not in row for row in rows):
        raise DataError(
            f"{path} needs the columns file_name and label (its columns: {', '.join(rows[0])})"
        )
    labels, classes = _numbered([row.get(column) for row in rows], path)  # alike in all splits
    rows = [row | {column: label} for row, label in zip(rows, labels, strict=True)]
    rows, chosen = rows_of_split(rows, "file_name", split, path)
    if chosen is not None:
        title = f"{path.parent} ({chosen})"
    names = [str(row["file_name"]) for row in rows]
    root = image_root(path.parent, names, (), path)
    items = tuple(
        Labelled(name, image_of(root / name), int(str(row[column])))
        for name, row in zip(names, rows, strict=True)
    )
    return LabelledImages(title, items, classes)


def _numbered(labels: list[Any], path: Path) -> tuple[list[int], tuple[str, ...]]:
    """Labels as numbers, and the names of the classes if they had names."""
    if all(isinstance(label, (int, str)) and str(label).isdecimal() for label in labels):
        return [int(label) for label in labels], ()
    if not all(isinstance(label, str) and label for label in labels):
        wrong = next(label for label in labels if not (isinstance(label, str) and label))
        raise DataError(f"{path}: the label {wrong!r} is neither a name nor a number from 0 on")
    classes = tuple(sorted(set(labels)))
    number = {name: place for place, name in enumerate(classes)}
    return [number[label] for label in labels], classes


def _from_classes(folder: Path, title: str) -> LabelledImages:
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and image_files(path)]
    if len(classes) < 2:
        raise DataError(
            f"{folder} holds no images with classes: expected the binary version of CIFAR, "
            "Flowers-102, metadata.jsonl with file_name and label, or one folder per class, found "
            f"{contents(folder)}"
        )
    items = tuple(
        Labelled(str(path.relative_to(folder)), image_of(path), number)
        for number, place in enumerate(classes)
        for path in image_files(place)
    )
    return LabelledImages(title, items, tuple(path.name for path in classes))


def _from_datasets(source: str, split: str | None) -> LabelledImages:
    from vlp_plugins.data.hub import DatasetSource, open_dataset, roots_of

    dataset, chosen = open_dataset(source, split)
    features = dataset.features or {}
    column = next((name for name in LABEL_COLUMNS if name in features), None)
    if column is None:
        raise DataError(
            f"dataset {source} has no column of labels ({', '.join(LABEL_COLUMNS)}); its columns: "
            f"{', '.join(features) or 'unknown'}"
        )
    title = f"dataset {source}" + (f" ({chosen})" if chosen else "")
    records = DatasetSource(dataset, title, caption_column=column, roots=roots_of(source))
    names = tuple(getattr(features[column], "names", None) or ())
    return LabelledImages(title, _LazyItems(records), names)


class _LazyItems:
    """The rows of a dataset, read as often as they are iterated."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __iter__(self) -> Any:
        for record in self._source.records(None):
            if not isinstance(record.caption, int):
                raise DataError(
                    f"{self._source.description}, {record.place}: the label is "
                    f"{record.caption!r}, not a number"
                )
            yield Labelled(record.place, record.image, record.caption)


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
