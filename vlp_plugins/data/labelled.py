"""Images with a class each: CIFAR, Flowers-102, folders of classes, and what `datasets` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlp_plugins.data.annotation_files import contents, image_of, image_root
from vlp_plugins.data.columns import choose_split
from vlp_plugins.data.folder import image_files
from vlp_plugins.data.metadata import find_metadata, read_metadata, rows_of_split
from vlp_plugins.runtime.errors import DataError

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
    from vlp_plugins.data.cifar import is_cifar, open_cifar
    from vlp_plugins.data.flowers import is_flowers, open_flowers
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
