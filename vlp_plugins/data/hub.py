"""Any dataset that `datasets` reads: an id of the hub, a folder it saved, files of data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp_plugins.data.images import open_image
from vlp_plugins.data.records import (
    IMAGE_COLUMNS,
    Captions,
    CaptionSource,
    Record,
    buffered,
    choose_column,
    choose_split,
    columns_said,
    said_in,
)
from vlp_plugins.runtime.errors import DataError, first_line, nearest_path
from vlp_plugins.runtime.untrusted import check_inside, check_read, read_limit

if TYPE_CHECKING:
    from PIL.Image import Image

# Builders of `datasets` for single files.
FILE_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}
_SAVED = ("state.json", "dataset_dict.json")


class DatasetSource(CaptionSource):
    """The rows of a `datasets` dataset, streaming or not."""

    def __init__(
        self,
        dataset: Any,
        description: str,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        captions: Captions = "first",
        roots: Sequence[Path] | None = None,
    ) -> None:
        """Finds the columns of a `datasets.Dataset` or `IterableDataset`, if they are not named.

        `roots` are the folders that hold every image file that a row names; None allows any.

        Raises:
            DataError: if a column is not found.
        """
        import datasets

        super().__init__(description, captions)
        if dataset.features is None:  # a stream has its columns in its first row
            dataset = _guarded(description, dataset._resolve_features)
        features = dataset.features or {}
        images = [name for name, kind in features.items() if _of_images(kind)]
        self._image = choose_column(
            features, image_column or next(iter(images), None), IMAGE_COLUMNS,
            kind="image", where=description,
        )  # fmt: skip
        self._said: list[str] = []
        if captions != "none":
            self._said = columns_said(features, caption_column, captions, where=description)
        # Undecoded, so that one damaged image does not end the iteration.
        undecoded: Any = datasets.Image(decode=False)
        kind: Any = features.get(self._image)
        if hasattr(kind, "feature"):  # a list of them
            undecoded = type(kind)(undecoded)
        self._rows = _guarded(
            description,
            lambda: dataset.select_columns([self._image, *self._said]).cast_column(
                self._image, undecoded
            ),
        )
        self._roots = roots
        if captions != "all":
            self.length = _length(dataset)

    def records(self, seed: int | None) -> Iterator[Record]:
        rows: Iterable[Mapping[str, Any]] = self._rows
        sized = hasattr(self._rows, "__len__")
        if seed is not None and sized:
            order = random.Random(seed).sample(range(len(self._rows)), len(self._rows))
            rows = (self._rows[index] for index in order)
        records = self._records(rows)
        return records if seed is None or sized else buffered(records, seed)

    def _records(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
        number = 0
        try:
            for number, row in enumerate(rows, 1):
                shown = row[self._image]
                count = len(shown) if isinstance(shown, list) else int(shown is not None)
                caption = said_in(row, self._said, images=count) if self._said else None
                yield Record(f"record {number}", partial(self._open_all, shown), caption)
        except DataError:
            raise
        except Exception as error:  # network, parsers of many formats
            raise DataError(
                f"{self.description} broke off after {number:,} records: {_reason(error)}"
            ) from error

    def _open_all(self, value: Any) -> Image | list[Image]:
        if self.captions == "conversations":
            several = value if isinstance(value, list) else [] if value is None else [value]
            return [self._open(each) for each in several]
        if isinstance(value, list):
            value = next(iter(value), None)
        return self._open(value)

    def _open(self, value: Any) -> Image:
        if value is None:
            raise ValueError("it has no image")
        # Not by `datasets`: it has Pillow try every format, and opens any path and address.
        data, path = value.get("bytes"), value.get("path")
        if data is None and not path:
            raise ValueError("it has neither the bytes nor the path of an image")
        return open_image(self._fetched(str(path)) if data is None else data)

    def _fetched(self, path: str) -> bytes:
        """The content of a file that a row names: on the disk, in an archive or on the hub."""
        from datasets import config
        from datasets.utils.file_utils import xopen

        if self._roots and (self._roots[0] / path).is_file():  # relative to the table that names it
            path = str(self._roots[0] / path)
        place = path.rsplit("::", 1)[-1]  # the archive, of a member
        if self._roots is not None and not place.startswith(("hf://", f"{config.HF_ENDPOINT}/")):
            if "://" in place:
                raise DataError(f"{self.description} names {place}; download its images first")
            check_inside(place, self._roots, self.description)
        with xopen(path, "rb") as file:  # a member of an archive may unpack to any size
            data: bytes = file.read(read_limit() + 1)
        check_read(f"{path}: its file", len(data), ValueError)
        return data


def _of_images(kind: Any) -> bool:
    import datasets

    return isinstance(getattr(kind, "feature", kind), datasets.Image)


def open_dataset(source: str, split: str | None) -> tuple[Any, str | None]:
    """The dataset of an id (`name` or `name:configuration`), a folder or a file; its split, if any.

    It streams, unless it was saved to disk, or is from the cache because the hub is offline.

    Raises:
        DataError: if it cannot be loaded, or the split is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "this source is read with the package `datasets`, which is not installed: "
            "pip install vlp-plugins[data]"
        ) from error

    path = Path(source)
    if path.is_dir() and is_saved(path):
        _check_saved(path)
        found = _guarded(source, lambda: datasets.load_from_disk(source))
    elif path.is_file():
        builder = FILE_BUILDERS[path.suffix.lower()]
        found = _guarded(
            source,
            lambda: datasets.load_dataset(
                builder, data_files=source, streaming=True, trust_remote_code=False
            ),
        )
    else:
        found = _load(source, is_local=path.is_dir())
    if isinstance(found, dict):
        chosen = choose_split([*found], split, where=f"dataset {source}")
        return found[chosen], chosen if split or len(found) > 1 else None
    if split is not None:
        raise DataError(f"dataset {source} has no splits; leave split {split!r} out")
    return found, None


def roots_of(source: str) -> list[Path]:
    """Folders where the image files of `open_dataset(source)` may be: its own, or the cache."""
    path = Path(source)
    if path.exists():
        return [path if path.is_dir() else path.parent]
    from datasets import config

    return [Path(config.HF_CACHE_HOME), Path(config.HF_DATASETS_CACHE)]


def is_saved(folder: Path) -> bool:
    """True if a folder is what `save_to_disk` writes."""
    return any((folder / name).is_file() for name in _SAVED)


def _check_saved(folder: Path) -> None:
    """Raises `DataError` if what `save_to_disk` wrote names data files of other folders."""
    for state in folder.rglob(_SAVED[0]):
        with suppress(KeyError, TypeError, ValueError):  # damaged: `datasets` will say so
            for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
                check_inside(state.parent / file["filename"], folder, state)


def _load(source: str, *, is_local: bool) -> Any:
    import datasets

    name, _, configuration = (source, "", "") if is_local else source.partition(":")
    load = partial(datasets.load_dataset, name, configuration or None, trust_remote_code=False)

    def stream_or_cache() -> Any:
        try:
            return load(streaming=True)
        except ConnectionError:  # offline: it may be in the cache
            if is_local:
                raise
            return load()

    try:
        return _guarded(source, stream_or_cache)
    except DataError as error:
        if is_local or ":" in source:
            raise
        near = nearest_path(Path(source))
        raise DataError(
            f"there is no folder {source} here{near}, and as a hub id: {error}"
        ) from error


def _guarded(source: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # datasets raises what its many readers raise
        hint = f"; write {source}:CONFIGURATION" if "Config name is missing" in str(error) else ""
        message = f"cannot load dataset {source.removeprefix('dataset ')}: {_reason(error)}{hint}"
        raise DataError(message) from error


def _reason(error: Exception) -> str:
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def _length(dataset: Any) -> int | None:
    if hasattr(dataset, "__len__"):
        return len(dataset)
    splits = getattr(dataset.info, "splits", None) or {}
    info = splits.get(str(dataset.split))
    return getattr(info, "num_examples", None) or None
