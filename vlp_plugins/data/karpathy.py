"""COCO and Flickr30k with captions, in the splits of Karpathy and Fei-Fei (2015).

Two layouts: Karpathy's own file (`dataset_coco.json`, `dataset_flickr30k.json`), and the lists that
BLIP, ALBEF and X-VLM use, one per split (`coco_karpathy_test.json`, `flickr30k_test.json`,
`coco_test.json`; `..._gt.json` beside them has the references). Images: `train2014/` and
`val2014/` of COCO, `flickr30k-images/` of Flickr30k.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp_plugins.data.annotations import (
    find_file,
    image_of,
    image_root,
    need_keys,
    read_json,
    read_rows,
)
from vlp_plugins.data.records import Captions, CaptionSource, Record, choose_split
from vlp_plugins.runtime.errors import DataError

_OWN = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")
_LIST = re.compile(r"(?P<set>coco|flickr30k)(?:_karpathy)?_(?P<split>train|val|test)\.json")
_BELOW = ("images", "flickr30k-images", "flickr30k_images", "Flickr30k", "coco")
_SPLITS = {"restval": "train"}  # images of COCO's validation set that everybody trains on
_NUMBER = re.compile(r"(\d+)\.\w+$")


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image and what people wrote about it."""

    name: str
    captions: tuple[str, ...]


class ListedImages(CaptionSource):
    """Captioned images that a file lists, in its order."""

    def __init__(
        self, root: Path, images: Sequence[ListedImage], description: str, captions: Captions
    ) -> None:
        """Keeps the list; `root` is what names are relative to. Decodes nothing."""
        super().__init__(description, captions)
        self._root, self._images = root, tuple(images)
        self.length = sum(len(image.captions) if captions == "all" else 1 for image in images)

    def records(self, seed: int | None) -> Iterator[Record]:
        images: Sequence[ListedImage] = self._images
        if seed is not None:
            images = random.Random(seed).sample(images, len(images))
        for image in images:
            yield Record(image.name, image_of(self._root / image.name), list(image.captions))


def is_karpathy(folder: Path) -> bool:
    """True if a folder holds one of the files, itself or in `annotations`."""
    return _own_file(folder) is not None or bool(_lists(folder))


def open_karpathy(
    folder: Path, split: str | None = None, captions: Captions = "first"
) -> ListedImages:
    """The captioned images of one split.

    Args:
        folder: of the data set.
        split: `train`, `val` or `test`; None takes the only one, or `train`.
        captions: see `Captions`.

    Raises:
        DataError: if files or the split are missing, or are not what they should be.
    """
    own = _own_file(folder)
    if own is not None:
        by_split = _read_own(own)
        chosen = choose_split(list(by_split), split, where=str(own))
        source, images = own, by_split[chosen]
    else:
        lists = _lists(folder)
        if not lists:
            raise DataError(
                f"{folder} holds neither {' nor '.join(_OWN[:2])}, nor lists such as "
                "coco_karpathy_test.json or flickr30k_test.json"
            )
        chosen = choose_split(list(lists), split, where=str(folder))
        source = lists[chosen]
        images = _read_list(source)
    root = image_root(folder, [image.name for image in images], _BELOW, source)
    return ListedImages(root, images, f"{folder} ({chosen})", captions)


def _own_file(folder: Path) -> Path | None:
    return find_file(folder, _OWN)


def _lists(folder: Path) -> dict[str, Path]:
    """The lists by split.

    Raises:
        DataError: if they are of several data sets.
    """
    found: dict[str, Path] = {}
    names: dict[str, str] = {}
    for place in (folder, folder / "annotations"):
        for path in sorted(place.glob("*.json")):
            match = _LIST.fullmatch(path.name)
            if match is None:
                continue
            found.setdefault(match["split"], path)
            if len(names := names | {match["set"]: path.name}) > 1:
                raise DataError(
                    f"{folder} holds lists of two data sets, {' and '.join(names.values())}; "
                    "give a folder with the lists of one, and its images"
                )
    return found


def _read_own(path: Path) -> dict[str, list[ListedImage]]:
    """Images of Karpathy's file by split; those that lie in folders have them in their names."""
    by_split: dict[str, list[ListedImage]] = {}
    for row in read_rows(path, "images"):
        name, split, sentences = need_keys(row, ("filename", "split", "sentences"), path)
        captions = tuple(
            str(sentence["raw"]) for sentence in sentences if isinstance(sentence, dict)
            and sentence.get("raw")
        )  # fmt: skip
        if not captions:
            raise DataError(f'{path}: image {name} has no sentences with "raw" text')
        place = f"{row['filepath']}/{name}" if row.get("filepath") else str(name)
        by_split.setdefault(_SPLITS.get(split, split), []).append(ListedImage(place, captions))
    return by_split


def _read_list(path: Path) -> list[ListedImage]:
    """Images of a list of BLIP's kind; rows of the same image are one."""
    captions: dict[str, list[str]] = {}
    references: dict[int, list[str]] | None = None
    for row in read_rows(path):
        (name,) = need_keys(row, ("image",), path)
        said = row.get("caption")
        if said is None:
            references = _references(path) if references is None else references
            number = _NUMBER.search(str(name))
            said = references.get(int(number[1])) if number else None
        texts = [said] if isinstance(said, str) else list(said or ())
        if not texts:
            raise DataError(
                f"{path}: image {name} has no caption, and none is in {_gt_file(path).name}"
            )
        captions.setdefault(str(name), []).extend(map(str, texts))
    return [ListedImage(name, tuple(texts)) for name, texts in captions.items()]


def _gt_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}_gt.json")


def _references(path: Path) -> dict[int, list[str]]:
    """References of a list's `_gt.json` by number of the image; none without the file."""
    source = _gt_file(path)
    if not source.is_file():
        return {}
    content: Any = read_json(source)
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise DataError(f'{source} should hold an object with a list "annotations"')
    found: dict[int, list[str]] = {}
    for row in rows:
        number, caption = need_keys(row, ("image_id", "caption"), source)
        found.setdefault(int(number), []).append(str(caption))
    return found
