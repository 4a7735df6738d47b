"""Which name every offer goes by when plug-ins clash. Order decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from vlp_plugins.plugins.offers import SINGULAR, Offer


def public_names(offers: Sequence[Offer]) -> list[str]:
    """The name that each offer goes by.

    A name that one plug-in alone offers stays as it is. A built-in keeps its bare name; outsiders
    that clash with it, or with each other, are `distribution:name`. Scorers and methods share
    their names, because every scorer is also a method; a distribution may use one name for both.

    Args:
        offers: of all plug-ins together.

    Returns:
        One name per offer, unique within its kind.
    """
    return [_public_name(offer, rivals_of(offer, offers)) for offer in offers]


def rivals_of(offer: Offer, offers: Sequence[Offer]) -> list[Offer]:
    """The offers that want the same name."""
    return [
        other
        for other in offers
        if other is not offer
        and other.name == offer.name
        and _name_space(other) == _name_space(offer)
        and (other.kind == offer.kind or other.distribution != offer.distribution)
    ]


def clash_note(offer: Offer, public: str, offers: Sequence[Offer]) -> str | None:
    """What `vlp plugins` says about an offer that could not keep its name; None if it could."""
    if public == offer.name:
        return None
    owners = sorted({_describe(other) for other in rivals_of(offer, offers)})
    return (
        f"{SINGULAR[offer.kind]} {offer.name!r} clashes with {' and '.join(owners)}: use {public!r}"
    )


def _name_space(offer: Offer) -> str:
    return "methods" if offer.kind == "scorers" else offer.kind


def _public_name(offer: Offer, rivals: Sequence[Offer]) -> str:
    if not rivals or (offer.builtin and not any(rival.builtin for rival in rivals)):
        return offer.name
    if any(rival.distribution == offer.distribution for rival in rivals):
        return f"{offer.distribution}:{offer.plugin}:{offer.name}"
    return offer.qualified


def _describe(offer: Offer) -> str:
    kind = SINGULAR[offer.kind]
    return f"the built-in {kind}" if offer.builtin else f"the {kind} of {offer.distribution}"
