"""Opens what a user writes after `--data` as a source of captioned images."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypedDict

from vlp_plugins.data.folder import METADATA_NAMES, has_metadata, open_folder
from vlp_plugins.data.hub import FILE_BUILDERS, DatasetSource, is_saved, open_dataset, roots_of
from vlp_plugins.data.karpathy import is_karpathy, open_karpathy
from vlp_plugins.data.records import Captions, CaptionSource
from vlp_plugins.data.shards import TarShards, find_shards, is_shards
from vlp_plugins.runtime.errors import DataError

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


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
    if path.name in METADATA_NAMES and path.is_file():
        path = path.parent
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
        if path.suffix.lower() not in FILE_BUILDERS:
            raise DataError(
                f"{source} is a single file of unknown kind; give a folder with metadata.jsonl, "
                f"a .tar, or one of {', '.join(FILE_BUILDERS)}"
            )
        return _dataset(str(path), split, options)
    if not _HUB_ID.fullmatch(source):
        fetch = "; download it first" if "://" in source else ""
        raise DataError(f"data {source} does not exist{fetch or ': check the path'}")
    try:
        return _dataset(source, split, options)
    except DataError as error:
        if ":" not in source and path.parent.is_dir():
            raise DataError(
                f"there is no folder {source} here, and as a hub id: {error}"
            ) from error
        raise


def checked_source(data: object) -> str:
    """What a Python user names as data, as text.

    Raises:
        DataError: if it is no path, pattern or id.
    """
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
    return TarShards(shards, source + (f" ({chosen})" if chosen else ""), **options)


def _dataset(source: str, split: str | None, options: _Options) -> CaptionSource:
    dataset, chosen = open_dataset(source, split)
    description = f"dataset {source}" + (f" ({chosen})" if chosen else "")
    return DatasetSource(dataset, description, **options, roots=roots_of(source))
