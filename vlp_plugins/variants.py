"""Which variant of a method is meant, and whose inputs count for a tied weight."""

from __future__ import annotations

from typing import Literal

from vlp_plugins.runtime.errors import UnsupportedError, suggest

Variant = Literal["default", "published"]
Owners = Literal["all", "first"]


def is_published(variant: str) -> bool:
    """True for `published`, False for `default`.

    Raises:
        UnsupportedError: for anything else.
    """
    return _one_of(variant, "variant", ("default", "published")) == "published"


def resolve_owners(owners: str | None, *, published: bool) -> Owners:
    """`all` or `first`; None: `all`, or `first` in the published variant.

    Raises:
        UnsupportedError: for anything else.
    """
    if owners is None:
        return "first" if published else "all"
    return "all" if _one_of(owners, "owners", ("all", "first")) == "all" else "first"


def _one_of(value: str, what: str, known: tuple[str, str]) -> str:
    if value not in known:
        raise UnsupportedError(f"{what} {value!r} is unknown{suggest(str(value), list(known))}")
    return value
