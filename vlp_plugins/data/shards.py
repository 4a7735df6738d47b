"""WebDataset tar shards, streamed: `0001.jpg` and `0001.txt` (or `.json`) make one record."""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from glob import glob
from itertools import product
from pathlib import Path

from PIL import Image

from vlp_plugins.data.images import open_image
from vlp_plugins.data.records import (
    CAPTION_COLUMNS,
    Captions,
    CaptionSource,
    Record,
    buffered,
    choose_column,
    choose_split,
    split_among,
)
from vlp_plugins.runtime.errors import DataError, first_line
from vlp_plugins.runtime.untrusted import check_read

_IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
_TAR = re.compile(r"\.(tar|tgz|tar\.gz)$")
# WebDataset's rule: the key goes to the first dot of the base name, the field follows it.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_WORD = re.compile(r"[A-Za-z]+")
_BRACE = re.compile(r"\{([^{}]*)\}")

Fields = Mapping[str, bytes]


class TarShards(CaptionSource):
    """The records of tar files, shard after shard, without unpacking them.

    Shuffling mixes the shards, and the records within a buffer.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        description: str,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        captions: Captions = "first",
    ) -> None:
        """Finds in the first record which of its files are image and caption.

        Raises:
            DataError: if a shard is missing or damaged, or the fields are not there.
        """
        super().__init__(description, captions)
        self._shards = tuple(shards)
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise DataError(
                f"{len(missing):,} of {len(shards):,} shards do not exist (first: {missing[0]})"
            )
        first = next((found for shard in shards for found in _samples(shard)), None)
        if first is None:
            raise DataError(f"{description}: the shards hold no records (0001.jpg with 0001.txt)")
        fields = first[1]
        self._image = choose_column(
            fields, image_column, _IMAGE_FIELDS, kind="image", where=description
        )
        self._caption = ("", "")
        if captions != "none":
            self._caption = _caption_place(fields, caption_column, description)

    def records(self, seed: int | None) -> Iterator[Record]:
        shards = list(self._shards)
        if seed is not None:
            random.Random(seed).shuffle(shards)
        records = (record for shard in shards for record in self._shard(shard))
        return records if seed is None else buffered(records, seed)

    def _shard(self, shard: Path) -> Iterator[Record]:
        field, key = self._caption
        for name, fields in _samples(shard):
            place = f"{shard.name}/{name}"
            try:
                caption = _caption_value(fields, field, key)
            except ValueError as error:
                caption = None
                place += f" ({field}: {error})"
            yield Record(place, partial(_decode, fields, self._image), caption)


def find_shards(source: str, split: str | None = None) -> tuple[list[Path], str | None]:
    """The shards that a source names, and their split if it has several.

    The source is `dir/{000..003}.tar`, `dir/*.tar`, one file, or a folder. A split is a sub-folder
    of a folder, or what the file names begin with.

    Raises:
        DataError: if there are none.
    """
    folder = Path(source)
    if folder.is_dir():
        shards = _tars(folder)
        below = [sub.name for sub in sorted(folder.iterdir()) if sub.is_dir() and _tars(sub)]
        if below and (split in below or not shards):
            split = choose_split(below, split, where=source)
            return _tars(folder / split), split
        if split is None:
            words = [match[0] for shard in shards if (match := _WORD.match(shard.name))]
            split = split_among(words, None, where=source)
    else:
        shards = [Path(path) for name in expand_braces(source) for path in _matching(name)]
    if split is not None:
        shards = [shard for shard in shards if shard.name.startswith(split)]
    if not shards:
        wish = "" if split is None else f" of split {split!r}"
        raise DataError(f"no .tar shards{wish} at {source}; check the path")
    return shards, split


def is_shards(source: str) -> bool:
    """True if a source is the name or pattern of shards, or a folder that holds some."""
    folder = Path(source)
    if folder.is_dir():
        return bool(_tars(folder)) or any(_tars(sub) for sub in folder.iterdir() if sub.is_dir())
    return bool(_TAR.search(source))


def expand_braces(pattern: str) -> list[str]:
    """`a/{000..002}.tar` to three names; `{train,test}` to two; any number of braces.

    Raises:
        DataError: for a range that counts down.
    """
    parts = _BRACE.split(pattern)  # text, inside of a brace, text, ...
    choices = [_choices(part) if at % 2 else [part] for at, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if last < first:
        raise DataError(f"the range {{{inside}}} is empty; write the smaller number first")
    return [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]


def _matching(name: str) -> list[str]:
    if not any(sign in name for sign in "*?["):
        return [name]
    return sorted(glob(name))  # noqa: PTH207  Path.glob refuses absolute patterns


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _TAR.search(path.name))


class _Member(tarfile.TarInfo):
    """A member whose name, which tarfile reads before we can check it, is not too long."""

    _NAMES = (
        tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
    )  # fmt: skip

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        # Meant to be overridden, as tarfile says, and called in every version of Python; newer
        # ones call frombuf no more.
        if self.type in self._NAMES:
            check_read("the name of a member", self.size, tarfile.ReadError)
        return super()._proc_member(tar)  # type: ignore[misc]


def _samples(shard: Path) -> Iterator[tuple[str, Fields]]:
    """Key and files of every record: members that follow each other and share a key."""
    current, fields = "", dict[str, bytes]()
    try:
        with tarfile.open(shard, "r|*", tarinfo=_Member) as tar:
            for member in tar:
                match = _MEMBER.fullmatch(member.name)
                content = tar.extractfile(member) if match and member.isfile() else None
                if match is None or content is None:
                    continue
                if match[1] != current:
                    if fields:
                        yield current, fields
                    current, fields = match[1], {}
                field = match[2].lower()
                if field in fields:
                    raise DataError(
                        f"shard {shard} holds {member.name} twice in one record; give every pair "
                        "of image and caption a name of its own (0001.jpg with 0001.txt)"
                    )
                size = member.size + sum(map(len, fields.values()))
                check_read(f"{shard}: record {match[1]}", size, DataError)
                fields[field] = content.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DataError(
            f"shard {shard} is damaged: {first_line(error)}; fetch or make it again"
        ) from error
    if fields:
        yield current, fields


def _caption_place(fields: Fields, asked: str | None, where: str) -> tuple[str, str]:
    """File of a record that holds the caption, and the key in it if it is JSON."""
    for field in ("txt", "caption", "text"):
        if field in fields and asked in (None, field):
            return field, ""
    where = f"the first record of {where}"
    try:
        inside = _json(fields["json"]) if "json" in fields else {}
    except ValueError as error:
        raise DataError(f"{where} has a json file that is not JSON: {error}") from error
    column = choose_column(inside or fields, asked, CAPTION_COLUMNS, kind="caption", where=where)
    return ("json", column) if inside else (column, "")


def _caption_value(fields: Fields, field: str, key: str) -> object:
    if not field or field not in fields:
        return None
    return _json(fields[field]).get(key) if key else fields[field].decode()


def _json(content: bytes) -> dict[str, object]:
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(f"its JSON is nested too deep ({error})") from error
    return value if isinstance(value, dict) else {}


def _decode(fields: Fields, field: str) -> Image.Image:
    names = [field, *_IMAGE_FIELDS]  # shards may mix jpg and png
    found = next((name for name in names if name in fields), None)
    if found is None:
        raise ValueError(f"it has no image (its files: {', '.join(fields)})")
    return open_image(fields[found])
