"""Which column holds the image, which the caption, which split is meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlp_plugins.errors import DataError, suggest

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
