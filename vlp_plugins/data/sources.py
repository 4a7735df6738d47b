"""Opens what a user writes after `--data` as a source of captioned images."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from vlp_plugins.data import conversations
from vlp_plugins.data.annotations import beginning, image_of, image_root, read_rows
from vlp_plugins.data.conversations import CHOICES
from vlp_plugins.data.folder import (
    METADATA_SUFFIXES,
    find_metadata,
    has_metadata,
    open_folder,
    read_metadata,
)
from vlp_plugins.data.hub import FILE_BUILDERS, DatasetSource, is_saved, open_dataset, roots_of
from vlp_plugins.data.images import check_no_video
from vlp_plugins.data.karpathy import is_karpathy, open_karpathy
from vlp_plugins.data.questions import holds_questions, open_questions
from vlp_plugins.data.records import (
    Captions,
    CaptionSource,
    Record,
    RecordList,
    choose_split,
    said_in,
    with_split,
)
from vlp_plugins.data.shards import TarShards, find_shards, is_shards
from vlp_plugins.runtime.errors import DataError, check_hub_id


def open_source(
    source: str,
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    captions: Captions = "first",
) -> CaptionSource:
    """Opens captioned images of any kind.

    - a folder of images with `metadata.jsonl` or `metadata.csv` (`file_name` and a caption), or
      with such sub-folders, one per split;
    - COCO and Flickr30k with Karpathy's splits, see `open_karpathy`;
    - WebDataset shards: `dir/{000..003}.tar`, `dir/*.tar`, one `.tar`, or a folder of them;
    - for chat models (`captions="conversations"`) also lists of conversations as LLaVA has them,
      and questions with answers, see `open_questions`;
    - anything that `datasets` reads (extra `data`): what `save_to_disk` wrote, a folder or file
      of parquet, JSON or CSV, or an id of the hub, `name` or `name:configuration`.

    Args:
        source: path, pattern or id.
        split: which split; None takes the only one, or `train`.
        image_column: column (of a folder: of file names; of shards: file ending) of the images.
        caption_column: column (of shards: file ending or key of the JSON) of the captions.
        captions: what to do with several captions of one image; see `Captions`.

    Raises:
        DataError: if nothing is there, or it lacks images, captions or metadata.
    """
    options: _Options = {
        "image_column": image_column,
        "caption_column": caption_column,
        "captions": captions,
    }
    path = Path(source).expanduser()
    if path.suffix.lower() in METADATA_SUFFIXES and path.is_file():
        path = path.parent if find_metadata(path.parent) == path else path
    if captions == "conversations" and (found := _open_conversations(path, split)) is not None:
        return found
    if path.is_dir():
        if is_karpathy(path):
            return open_karpathy(path, split, captions)
        if is_saved(path):
            return _dataset(str(path), split, options)
        if has_metadata(path):
            return open_folder(path, split=split, **options)
        if is_shards(str(path)):
            return _shards(str(path), split, options)
        if any(p.suffix.lower() in FILE_BUILDERS for p in path.rglob("*")):
            return _dataset(str(path), split, options)
        return open_folder(path, split=split, **options)
    if is_shards(str(path)) and "://" not in source:
        return _shards(str(path), split, options)
    if path.is_file():
        check_no_video(path)
        if path.suffix.lower() not in FILE_BUILDERS:
            raise DataError(
                f"{source} is a single file of unknown kind; give a folder with metadata.jsonl, "
                f"a .tar, or one of {', '.join(FILE_BUILDERS)}"
            )
        return _dataset(str(path), split, options)
    check_hub_id(source, "data", DataError)
    return _dataset(source, split, options)


_LISTED = re.compile(rf'"({"|".join(conversations.COLUMNS)})"\s*:\s*\[')


def _open_conversations(path: Path, split: str | None) -> CaptionSource | None:
    """The conversations that a JSON file lists, or questions; None if a path has neither."""
    if path.is_dir():
        files = {p.stem: p for p in sorted(path.glob("*.json*")) if _lists_conversations(p)}
        if files:
            path = files[choose_split([*files], split, where=str(path))]
        elif holds_questions(path):
            return _answered(path, split)
        else:
            return None
    elif not path.is_file() or not _lists_conversations(path):
        return None
    rows = read_metadata(path, lines=True) if path.suffix == ".jsonl" else read_rows(path)
    shown = [_images_of(row) for row in rows]
    names = [name for several in shown for name in several]
    below = ("images", "image")
    root = image_root(path.parent, names, below, path) if names else path.parent
    column = next(name for name in conversations.COLUMNS if name in rows[0])
    records = [
        Record(
            f"{path.name}, conversation {number}",
            partial(_opened, [root / name for name in several]),
            said_in(row, [column], images=len(several)),
        )
        for number, (row, several) in enumerate(zip(rows, shown, strict=True), 1)
    ]
    return RecordList(records, str(path), "conversations")


def _lists_conversations(path: Path) -> bool:
    if path.suffix not in (".json", ".jsonl") or path.stem == "metadata":
        return False
    return _LISTED.search(beginning(path)) is not None


def _images_of(row: Mapping[str, Any]) -> list[str]:
    """The files that a conversation is about."""
    named = row.get("image", row.get("images"))
    several = named if isinstance(named, list) else [named] if named else []
    return [str(each.get("path") if isinstance(each, dict) else each) for each in several]


def _opened(paths: Sequence[Path]) -> list[Image.Image]:
    return [image_of(path)() for path in paths]


def _answered(folder: Path, split: str | None) -> CaptionSource:
    asked = open_questions(str(folder), split)
    records = [
        Record(each.place, each.image, said_in(
            {"question": each.texts[0], "answers": each.answers, CHOICES: each.choices},
            ["question", "answers", CHOICES], images=1,
        ))
        for each in asked.items
    ]  # fmt: skip
    return RecordList(records, asked.description, "conversations")


def checked_source(data: object) -> str:
    """What a Python user names as data, as text; `DataError` if it is no path, pattern or id."""
    if isinstance(data, (str, os.PathLike)):
        return str(data)
    raise DataError(
        f"data is a {type(data).__name__}, not the path of a folder or file or the id of a data "
        "set; a list of batches or a loader goes to prune as it is"
    )


class _Options(TypedDict):
    image_column: str | None
    caption_column: str | None
    captions: Captions


def _shards(source: str, split: str | None, options: _Options) -> CaptionSource:
    shards, chosen = find_shards(source, split)
    return TarShards(shards, with_split(source, chosen), **options)


def _dataset(source: str, split: str | None, options: _Options) -> CaptionSource:
    dataset, chosen = open_dataset(source, split)
    description = with_split(f"dataset {source}", chosen)
    return DatasetSource(dataset, description, **options, roots=roots_of(source))
