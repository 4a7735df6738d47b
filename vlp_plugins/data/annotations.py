"""Files that describe the images of a published data set, and where those images are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlp_plugins.data.images import read_image
from vlp_plugins.runtime.errors import DataError, first_line
from vlp_plugins.runtime.untrusted import check_inside, is_file, read_as


def read_json(path: Path) -> Any:
    """The content of a JSON file; `DataError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # JSON and its encoding
        raise DataError(f"{path} is not JSON ({first_line(error)}); fetch it again") from error


def beginning(path: Path) -> str:
    """The first 64 KiB of a file, which tell what it lists."""
    with path.open("rb") as file:
        return file.read(1 << 16).decode("utf-8", "replace")


def read_rows(path: Path, key: str | None = None) -> list[Mapping[str, Any]]:
    """The rows of a JSON file: a list of objects, or the one under `key`.

    Raises:
        DataError: if it is something else.
    """
    content = read_json(path)
    found = content.get(key) if key is not None and isinstance(content, dict) else content
    if isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        return found
    wanted = "a list of objects" if key is None else f'an object with a list "{key}" of objects'
    if isinstance(content, dict):
        what = f"an object with {', '.join(map(str, list(content)[:5])) or 'no keys':.300}"
    else:
        what = "an empty list" if content == [] else f"a {type(content).__name__}"
    raise DataError(f"{path} should hold {wanted}; it is {what}")


Text = str | int | float
"""What stands for a text: JSON writers make numbers of some."""


def need_keys(row: Mapping[str, Any], keys: Mapping[str, Any], path: Path) -> list[Any]:
    """The values of keys in a row of a file, which must be of a type each; see `read_as`.

    Raises:
        DataError: if one is missing or of another type.
    """
    missing = [key for key in keys if key not in row]
    if missing:
        raise DataError(
            f"{path}: a row has no {', '.join(missing)} (it has: {', '.join(map(str, row)):.300})"
        )
    try:
        return [read_as(kind, row[key], key) for key, kind in keys.items()]
    except ValueError as error:
        raise DataError(f"{path}: in a row, {error}") from error


def find_file(folder: Path, *names: str) -> Path | None:
    """The first of some files that is there, in the folder or its `annotations`."""
    places = (place / name for name in names for place in (folder, folder / "annotations"))
    return next((place for place in places if place.is_file()), None)


def matching_files(folder: Path, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Path]]:
    """The JSON files in the folder, then in its `annotations`, whose names match, by name."""
    places = (folder, folder / "annotations")
    paths = (path for place in places for path in sorted(place.glob("*.json")))
    return [(match, path) for path in paths if (match := pattern.fullmatch(path.name))]


def image_root(folder: Path, names: Sequence[str], below: Sequence[str], source: Path) -> Path:
    """The folder that the names of images in a source are relative to, checked for every image.

    It is the data set's own, or one of those `below` it.

    Raises:
        DataError: if the first is in none of the folders, others are missing, or one is outside
            the data set's folder.
    """
    places = [folder, *(folder / name for name in below)]
    root = next((place for place in places if is_file(place / names[0])), None)
    if root is None:
        tried = ", ".join(str(place) for place in places)
        raise DataError(
            f"{source} names the image {names[0]:.300}, which is in none of {tried}; put the "
            "images there, or link their folder"
        )
    for name in dict.fromkeys(names):
        check_inside(root / name, folder, source)
    missing = [name for name in dict.fromkeys(names) if not is_file(root / name)]
    if missing:
        raise DataError(
            f"{source} names {len(missing):,} of {len(set(names)):,} images that are not in {root} "
            f"(first: {missing[0]:.300}); fetch them again"
        )
    return root


def image_of(path: Path) -> Callable[[], Image.Image]:
    """A function that opens an image when it is needed."""
    return partial(read_image, path)


def contents(folder: Path) -> str:
    """The first few names in a folder, for messages."""
    names = sorted(path.name for path in folder.iterdir())
    return (", ".join(names[:8]) or "nothing") + (", ..." if names[8:] else "")
