"""Images with a class each: CIFAR, Flowers-102, folders of classes, and what `datasets` reads."""

from __future__ import annotations

import logging
import random
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from vlp_plugins.data.annotations import contents, image_of, image_root
from vlp_plugins.data.folder import (
    file_column,
    find_split,
    image_files,
    read_metadata,
    rows_of_split,
    subfolders,
)
from vlp_plugins.data.records import (
    SPLITS,
    CaptionSource,
    Record,
    Sample,
    Samples,
    buffered,
    choose_split,
    with_split,
)
from vlp_plugins.runtime.errors import DataError, check_hub_id, first_line, shown
from vlp_plugins.runtime.untrusted import read_limit

_log = logging.getLogger(__name__)

_MOST_CLASSES = 10**9
_LABEL_COLUMNS = ("label", "fine_label", "labels", "class", "target")


def open_labelled(source: str, split: str | None = None) -> Samples:
    """Opens images with classes.

    - CIFAR-10 and CIFAR-100, the binary version: `cifar-10-batches-bin/` or `cifar-100-binary/`
      (the 100 classes), or the folder that holds it. The Python version is not read: its pickles
      can run code;
    - Flowers-102: `imagelabels.mat`, `setid.mat`, `jpg/image_00001.jpg`, ...;
    - a folder with `metadata.jsonl` or `.csv` of `file_name` and `label` (a number, or a name:
      names are numbered in alphabetical order), or with one such sub-folder per split;
    - a folder with one sub-folder of images per class, numbered in alphabetical order, perhaps
      below one folder per split;
    - anything that `datasets` reads (extra `data`) with a column of labels.

    Raises:
        DataError: if it is none of these, or files are missing or damaged.
    """
    from vlp_plugins.data.hub import FILE_BUILDERS, is_saved

    folder = Path(source).expanduser()
    if not folder.is_dir():
        check_hub_id(source, "data", DataError)
        return _from_datasets(source, split)
    if (cifar := _find_cifar(folder)) is not None:
        return _from_cifar(*cifar, split)
    if any((folder / name).is_file() for name in (_LABELS, _SPLITS)):
        return _from_flowers(folder, split)
    if (found := find_split(folder, split)) is not None:
        return _from_metadata(folder, *found)
    files = {path.suffix.lower() for path in folder.rglob("*")}
    if is_saved(folder) or files & FILE_BUILDERS.keys():
        return _from_datasets(source, split)
    return _from_classes(folder, split)


def class_numbers(model: nn.Module, classes: Sequence[str]) -> dict[int, int]:
    """Number of a class in the data -> its number in the model, by their names.

    A split in which a class has no image numbers those after it otherwise than the model does.

    Args:
        model: whose configuration may name its classes.
        classes: of the data, by number; empty if they have no names.

    Returns:
        Empty if names do not tell: the numbers are the same then.
    """
    own = _class_names(model)
    strange = [name for name in classes if own and name not in own]
    if strange:
        _log.warning(
            "%d of %d classes of the data are none of the model's (first: %r; the model has %r, "
            "...), so classes are compared by number",
            len(strange), len(classes), strange[0], next(iter(own)),
        )  # fmt: skip
    return {} if strange or not own else {number: own[name] for number, name in enumerate(classes)}


def _class_names(model: nn.Module | None) -> dict[str, int]:
    """Numbers of the classes that a configuration names; empty if it only numbers them."""
    names: Mapping[int, str] = getattr(getattr(model, "config", None), "id2label", None) or {}
    unnamed = all(name == f"LABEL_{number}" for number, name in names.items())
    return {} if unnamed else {str(name): int(number) for number, name in names.items()}


class LabelSource(CaptionSource):
    """Images with the number of their class in a model in place of a caption."""

    def __init__(self, images: Samples, model: nn.Module | None) -> None:
        """Takes images whose classes are those of `model`; None takes any.

        Raises:
            DataError: if the model does not have one of the classes.
        """
        super().__init__(images.description, "labels")
        own = _class_names(model)
        strange = [name for name in images.classes if own and name not in own]
        limit = getattr(getattr(model, "config", None), "num_labels", None)
        self._items = images.items
        self.length = self._items.source.length if isinstance(self._items, _LabelledRows) else None
        if isinstance(self._items, tuple):
            self.length = len(self._items)
            above = limit is not None and any((item.label or 0) >= limit for item in self._items)
            strange += ["of that number"] if above and not own else []
        if strange:
            raise DataError(f"{images.description}: the model has no class {strange[0]}")
        self._numbers = class_numbers(model, images.classes) if model is not None else {}

    def records(self, seed: int | None) -> Iterator[Record]:
        items: Iterable[Sample] = self._items
        if seed is not None and isinstance(items, tuple):
            items = random.Random(seed).sample(items, len(items))
        elif seed is not None:
            items = buffered(items, seed)
        return (Record(i.place, i.image, self._numbers.get(i.label or 0, i.label)) for i in items)


def _from_metadata(folder: Path, path: Path, split: str | None) -> Samples:
    rows = read_metadata(path)
    column = next((name for name in _LABEL_COLUMNS if name in rows[0]), None)
    image = file_column(rows[0])
    if column is None or any(image not in row for row in rows):
        raise DataError(
            f"{path} needs the columns file_name and label (its columns: {', '.join(rows[0])})"
        )
    labels, classes = _numbered([row.get(column) for row in rows], path)  # alike in all splits
    rows = [row | {column: label} for row, label in zip(rows, labels, strict=True)]
    rows, chosen = rows_of_split(rows, image, split, path, folder)
    names = [str(row[image]) for row in rows]
    root = image_root(path.parent, names, (), path)
    items = tuple(
        Sample(name, image_of(root / name), label=int(str(row[column])))
        for name, row in zip(names, rows, strict=True)
    )
    return Samples(with_split(folder, chosen), items, classes)


def _numbered(labels: list[Any], path: Path) -> tuple[list[int], tuple[str, ...]]:
    """Labels as numbers, and the names of the classes if they had names."""
    if all(isinstance(label, (int, str)) and _is_number(label) for label in labels):
        return [int(label) for label in labels], ()
    for label in labels:
        if not (isinstance(label, str) and label):
            raise DataError(
                f"{path}: the label {shown(label)} is neither a name nor a number from 0 on"
            )
    classes = tuple(sorted(set(labels)))
    number = {name: place for place, name in enumerate(classes)}
    return [number[label] for label in labels], classes


def _is_number(label: int | str) -> bool:
    """Whether a label is the number of a class; no data set has a thousand million."""
    if isinstance(label, int):
        return not isinstance(label, bool) and 0 <= label < _MOST_CLASSES
    return label.isdecimal() and len(label) < len(str(_MOST_CLASSES))


def _from_classes(folder: Path, split: str | None) -> Samples:
    # Folders of splits hold folders of classes, not images.
    splits = [
        path.name for path in subfolders(folder)
        if any(image_files(inner) for inner in subfolders(path))
    ]  # fmt: skip
    chosen = split
    if splits and (split is None or not (folder / split).is_dir()):
        chosen = choose_split(splits, split, where=str(folder))
    elif split is not None and not (folder / split).is_dir():
        raise DataError(f"{folder} has no split {split!r}; it holds {contents(folder)}")
    place = folder if chosen is None else folder / chosen
    classes = [path for path in subfolders(place) if image_files(path)]
    if len(classes) < 2 or SPLITS.issuperset(path.name.lower() for path in classes):
        raise DataError(
            f"{place} holds no images with classes: expected the binary version of CIFAR, "
            "Flowers-102, metadata.jsonl with file_name and label, or one folder per class, found "
            f"{contents(place)}"
        )
    items = tuple(
        Sample(str(path.relative_to(place)), image_of(path), label=number)
        for number, images in enumerate(classes)
        for path in image_files(images)
    )
    names = tuple(path.name for path in classes)
    return Samples(with_split(folder, chosen), items, names)


def _from_datasets(source: str, split: str | None) -> Samples:
    from vlp_plugins.data.hub import DatasetSource, open_dataset, roots_of

    dataset, chosen = open_dataset(source, split)
    features = dataset.features or {}
    column = next((name for name in _LABEL_COLUMNS if name in features), None)
    if column is None:
        raise DataError(
            f"dataset {source} has no column of labels ({', '.join(_LABEL_COLUMNS)}); its columns: "
            f"{', '.join(features) or 'unknown'}"
        )
    title = with_split(f"dataset {source}", chosen)
    rows = DatasetSource(dataset, title, caption_column=column, roots=roots_of(source))
    names = tuple(getattr(features[column], "names", None) or ())
    return Samples(title, _LabelledRows(rows), names)


@dataclass(frozen=True)
class _LabelledRows:
    """The rows of a dataset, read again in every iteration."""

    source: CaptionSource

    def __iter__(self) -> Iterator[Sample]:
        for record in self.source.records(None):
            if not isinstance(record.caption, int):
                raise DataError(
                    f"{self.source.description}, {record.place}: the label is "
                    f"{record.caption!r}, not a number"
                )
            yield Sample(record.place, record.image, label=record.caption)


_SIDE, _CHANNELS = 32, 3
_PIXELS = _SIDE * _SIDE * _CHANNELS


@dataclass(frozen=True)
class _Cifar:
    """The files of CIFAR-10 or CIFAR-100, also in the archive of the Python version.

    An image begins with so many bytes of labels; the last is the class.
    """

    folder: str
    pickled: str
    splits: dict[str, tuple[str, ...]]
    labels: int
    names: str

    @property
    def files(self) -> list[str]:
        """Of all splits."""
        return [name for names in self.splits.values() for name in names]


_CIFAR = (
    _Cifar(
        "cifar-10-batches-bin",
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)},
        1,
        "batches.meta.txt",
    ),
    _Cifar(
        "cifar-100-binary",
        "cifar-100-python",
        {"train": ("train.bin",), "test": ("test.bin",)},
        2,
        "fine_label_names.txt",
    ),
)


def _find_cifar(folder: Path) -> tuple[Path, _Cifar] | None:
    for cifar in _CIFAR:
        for place in (folder, folder / cifar.folder):
            if any((place / name).is_file() for name in cifar.files):
                return place, cifar
    for cifar in _CIFAR:
        if folder.name == cifar.pickled or (folder / cifar.pickled).is_dir():
            raise DataError(
                f"{folder} holds the Python version of CIFAR, which is pickles: they can run code, "
                f"so they are not read; take the binary version ({cifar.folder}), or parquet "
                "files, which `datasets` reads"
            )
    return None


def _from_cifar(folder: Path, cifar: _Cifar, split: str | None) -> Samples:
    chosen = choose_split(list(cifar.splits), split, where=str(folder))
    items = [item for name in cifar.splits[chosen] for item in _cifar_images(folder / name, cifar)]
    names = folder / cifar.names
    text = names.read_text(encoding="utf-8", errors="replace") if names.is_file() else ""
    return Samples(f"{folder} ({chosen})", tuple(items), tuple(text.split()))


def _cifar_images(path: Path, cifar: _Cifar) -> list[Sample]:
    if not path.is_file():
        raise DataError(f"{path} is missing; the folder should hold {', '.join(cifar.files)}")
    size = cifar.labels + _PIXELS
    total = path.stat().st_size
    if not total or total % size:
        raise DataError(
            f"{path} has {total:,} bytes, which is not a multiple of the {size:,} of an image: it "
            "is cut off or no CIFAR file; unpack the archive again"
        )
    rows = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, size)
    return [
        Sample(f"{path.name}, image {n}", partial(_image, rows, n, cifar.labels), label=int(label))
        for n, label in enumerate(rows[:, cifar.labels - 1])
    ]


def _image(rows: np.ndarray, number: int, labels: int) -> Image.Image:
    planes = np.asarray(rows[number, labels:]).reshape(_CHANNELS, _SIDE, _SIDE)
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


_LABELS, _SPLITS = "imagelabels.mat", "setid.mat"
_IDS = {"train": "trnid", "val": "valid", "test": "tstid"}


def _from_flowers(folder: Path, split: str | None) -> Samples:
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
        Sample(name, image_of(root / name), label=int(labels[number - 1]) - 1)
        for name, number in zip(names, ids, strict=True)
    )
    return Samples(f"{folder} ({chosen})", items)


_MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 9: "f8", 12: "i8", 13: "u8"}
_MAT_MATRIX, _MAT_COMPRESSED = 14, 15


def _numbers(path: Path, key: str) -> np.ndarray:
    """A row of integers of a MATLAB file (version 5), `[n]`."""
    # Not by scipy, whose parser crashes the process on some damaged files.
    data = path.read_bytes()
    found = []
    try:
        if data[126:128] != b"IM":
            raise ValueError("it does not begin as one of version 5 does")
        for kind, body in _mat_elements(data[128:]):
            if kind == _MAT_COMPRESSED:
                inner = zlib.decompressobj().decompress(body, read_limit())
                ((kind, body),) = _mat_elements(inner)
            if kind != _MAT_MATRIX:
                continue
            _, _, (_, name), *values = _mat_elements(body)
            found.append(name.decode("ascii"))
            if found[-1] == key:
                number, content = values[0]
                row = np.frombuffer(content, np.dtype(_MAT_TYPES[number]).newbyteorder("<"))
                return row.astype(np.int64)
    except (ValueError, KeyError, IndexError, struct.error, zlib.error) as error:
        raise DataError(
            f"{path} is damaged or no MATLAB file: {first_line(error)}; fetch it again"
        ) from error
    raise DataError(f"{path} has no {key!r} (it has: {shown(', '.join(found)) or 'nothing'})")


def _mat_elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of every element, https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf."""
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from("<II", data, place)
        begin, padded = place + 8, -(-size // 8) * 8
        if kind >> 16:  # up to four bytes lie in the tag
            kind, size, begin, padded = kind & 0xFFFF, kind >> 16, place + 4, 4
        if begin + size > len(data):
            raise ValueError("it ends in the middle of an element")
        yield kind, data[begin : begin + size]
        place = begin + (size if kind == _MAT_COMPRESSED else padded)
