"""Which column holds the image, which the caption, which split is meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlp_plugins.runtime.errors import DataError, suggest

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = (
    "text",
    "caption",
    "captions",
    "sentence",
    "sentences",
    "texts",
    "txt",
    "description",
    "raw",
    "alt_text",
)

_SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")
)


def choose_column(
    columns: Iterable[str], asked: str | None, known: Sequence[str], *, kind: str, where: str
) -> str:
    """The column that the user names, else the first usual name that is there (any case).

    Args:
        columns: what the source has.
        asked: what the user named.
        known: usual names, best first.
        kind: `image` or `caption`.
        where: description of the source.

    Raises:
        DataError: if the named column is not there, or none has a usual name.
    """
    columns = list(columns)
    listed = ", ".join(columns) or "none"
    if asked is not None:
        if asked in columns:
            return asked
        hint = suggest(asked, columns) if columns else " (there are no columns)"
        raise DataError(f"{where} has no column {asked!r}{hint}")
    lowered = {column.lower(): column for column in reversed(columns)}
    for name in known:
        if name in lowered:
            return lowered[name]
    raise DataError(
        f"{where} has no {kind} column that we know (its columns: {listed}); "
        f"name it with {kind}_column"
    )


def choose_split(available: Sequence[str], wanted: str | None, *, where: str) -> str:
    """The split asked for; without a wish the only one, or `train`.

    Raises:
        DataError: if it is not there, or none was named among several without `train`.
    """
    if wanted is None:
        if len(available) == 1:
            return available[0]
        if "train" in available:
            return "train"
        raise DataError(f"{where} has the splits {', '.join(available)}; name one with split")
    if wanted not in available:
        hint = suggest(wanted, list(available)) if available else " (it has no splits)"
        raise DataError(f"{where} has no split {wanted!r}{hint}")
    return wanted


def split_among(parts: Iterable[str], wanted: str | None, *, where: str) -> str | None:
    """The split that is meant among what names begin with: folders, or words of file names.

    Args:
        parts: of every name.
        wanted: the split asked for.
        where: description of the source.

    Returns:
        None if no split was asked for and the parts are no splits, or a single one.

    Raises:
        DataError: see `choose_split`.
    """
    found = list(dict.fromkeys(parts))
    if wanted is None and (len(found) < 2 or not any(part.lower() in _SPLITS for part in found)):
        return None
    return choose_split(found, wanted, where=where)


def first_folders(names: Iterable[str]) -> list[str]:
    """The first folder of every name that has one, for `split_among`."""
    return [name.split("/", 1)[0] for name in names if "/" in name]
