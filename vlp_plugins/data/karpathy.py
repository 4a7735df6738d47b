"""COCO and Flickr30k with captions, in the splits of Karpathy and Fei-Fei (2015).

Two layouts: Karpathy's own file (`dataset_coco.json`, `dataset_flickr30k.json`), and the lists that
BLIP, ALBEF and X-VLM use, one per split (`coco_karpathy_test.json`, `flickr30k_test.json`,
`coco_test.json`; `..._gt.json` next to them has the references). Images: `train2014/` and
`val2014/` of COCO, `flickr30k-images/` of Flickr30k.
"""

from __future__ import annotations

import re
from pathlib import Path

from vlp_plugins.data.annotations import (
    Text,
    find_file,
    image_of,
    image_root,
    matching_files,
    need_keys,
    read_rows,
)
from vlp_plugins.data.records import Captions, CaptionSource, Record, RecordList, choose_split
from vlp_plugins.runtime.errors import DataError

_OWN = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")
_LIST = re.compile(r"(?P<set>coco|flickr30k)(?:_karpathy)?_(?P<split>train|val|test)\.json")
_BELOW = ("images", "flickr30k-images", "flickr30k_images", "Flickr30k", "coco")
_SPLITS = {"restval": "train"}  # images of COCO's validation set that are always trained on
_NUMBER = re.compile(r"(\d+)\.\w+$")

_OWN_ROW = {"filename": str, "split": str, "sentences": list}

Listed = dict[str, list[str]]
"""The captions of every image, by its name."""


def is_karpathy(folder: Path) -> bool:
    """True if a folder holds one of the files, itself or in `annotations`."""
    return find_file(folder, *_OWN) is not None or bool(_lists(folder))


def open_karpathy(
    folder: Path, split: str | None = None, captions: Captions = "first"
) -> CaptionSource:
    """The captioned images of one split of a folder that `is_karpathy`.

    Raises:
        DataError: if files or the split are missing, or are not what they should be.
    """
    own = find_file(folder, *_OWN)
    if own is not None:
        by_split = _read_own(own)
        chosen = choose_split(list(by_split), split, where=str(own))
        source, images = own, by_split[chosen]
    else:
        lists = _lists(folder)
        chosen = choose_split(list(lists), split, where=str(folder))
        source = lists[chosen]
        images = _read_list(source)
    root = image_root(folder, list(images), _BELOW, source)
    records = [Record(name, image_of(root / name), texts) for name, texts in images.items()]
    return RecordList(records, f"{folder} ({chosen})", captions)


def _lists(folder: Path) -> dict[str, Path]:
    """The lists by split; raises `DataError` if they are of several data sets."""
    found: dict[str, Path] = {}
    names: dict[str, str] = {}
    for match, path in matching_files(folder, _LIST):
        found.setdefault(match["split"], path)
        names[match["set"]] = path.name
        if len(names) > 1:
            raise DataError(
                f"{folder} holds lists of two data sets, {' and '.join(names.values())}; "
                "give a folder with the lists of one, and its images"
            )
    return found


def _read_own(path: Path) -> dict[str, Listed]:
    """Karpathy's file by split; images that are in folders have them in their names."""
    by_split: dict[str, Listed] = {}
    for row in read_rows(path, "images"):
        name, split, sentences = need_keys(row, _OWN_ROW, path)
        captions = [
            sentence["raw"] for sentence in sentences
            if isinstance(sentence, dict) and isinstance(sentence.get("raw"), str)
            and sentence["raw"]
        ]  # fmt: skip
        if not captions:
            raise DataError(f'{path}: image {name} has no sentences with "raw" text')
        place = f"{row['filepath']}/{name}" if row.get("filepath") else name
        by_split.setdefault(_SPLITS.get(split, split), {}).setdefault(place, []).extend(captions)
    return by_split


def _read_list(path: Path) -> Listed:
    """A list of BLIP's kind; rows of the same image are one."""
    images: Listed = {}
    references: dict[int, list[str]] | None = None
    for row in read_rows(path):
        (name,) = need_keys(row, {"image": str}, path)
        (said,) = need_keys({"caption": None, **row}, {"caption": str | list[Text] | None}, path)
        if said is None:
            references = _references(path) if references is None else references
            number = _NUMBER.search(name)
            said = references.get(int(number[1])) if number else None
        texts = [said] if isinstance(said, str) else list(said or ())
        if not texts:
            raise DataError(
                f"{path}: image {name} has no caption, and none is in {_gt_file(path).name}"
            )
        images.setdefault(name, []).extend(map(str, texts))
    return images


def _gt_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}_gt.json")


def _references(path: Path) -> dict[int, list[str]]:
    """References of a list's `_gt.json` by number of the image; none without the file."""
    source = _gt_file(path)
    if not source.is_file():
        return {}
    found: dict[int, list[str]] = {}
    for row in read_rows(source, "annotations"):
        number, caption = need_keys(row, {"image_id": int, "caption": Text}, source)
        found.setdefault(number, []).append(str(caption))
    return found
