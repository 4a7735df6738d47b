"""Discovery of plug-ins: finds them, isolates broken ones, settles clashes of names."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.generic import MODULE, ModuleAdapter
from vlp_plugins.models.registry import (
    KINDS,
    METHOD_KINDS,
    SINGULAR,
    Offer,
    PluginReport,
    Registry,
    collect,
    time_limit,
)
from vlp_plugins.runtime.errors import MaskError, UnknownNameError, UnsupportedError, suggest
from vlp_plugins.runtime.model_state import takes_model

GROUP = "vlp_plugins"
BLOCK_VARIABLE = "VLP_PLUGINS_BLOCK"
OURS = "vlp-plugins"
_OUR_ENTRY_POINTS = {"builtin": "vlp_plugins.methods.builtin", "adapters": "vlp_adapters.plugin"}

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_discovering = False
_registry: Registry | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """An announced plug-in, not imported yet. `name` is unique among all candidates."""

    name: str
    distribution: str
    version: str
    entry_point: metadata.EntryPoint

    @property
    def builtin(self) -> bool:
        """True for our own plug-ins."""
        return self.distribution == OURS


def registry() -> Registry:
    """What all installed plug-ins offer; the first call finds them.

    The environment variable `VLP_PLUGINS_BLOCK` keeps outsiders out: names of plug-ins or
    distributions separated by commas, or `all`. Blocked plug-ins are not imported.

    Raises:
        UnsupportedError: if a plug-in asks for the registry while plug-ins are being found.
    """
    global _registry, _discovering
    with _lock:
        if _registry is None:
            if _discovering:
                raise UnsupportedError(
                    "registry() was called while plug-ins are being found; call it later, inside "
                    "the factory and not in a hook or at import"
                )
            _discovering = True
            try:
                _registry = discover()
            finally:
                _discovering = False
        return _registry


def discover(
    distributions: Iterable[metadata.Distribution] | None = None, block: str | None = None
) -> Registry:
    """Imports plug-ins one by one; a broken one is reported and nothing of it is registered.

    Args:
        distributions: where to look; None: everything that is installed.
        block: as `VLP_PLUGINS_BLOCK`, which None reads.
    """
    found = list(candidates(metadata.distributions() if distributions is None else distributions))
    blocked = _blocked(found, os.environ.get(BLOCK_VARIABLE, "") if block is None else block)
    errors: dict[str, str] = {}
    offers: list[Offer] = []
    for candidate in found:
        if candidate.name not in blocked:
            try:
                offers += _offers_of(candidate)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # any error ends this plug-in alone
                errors[candidate.name] = " ".join(f"{type(error).__name__}: {error}".split())
    named = [(_public_name(offer, offers), offer) for offer in offers]
    reports = [_report(c, named, errors.get(c.name), c.name in blocked) for c in found]
    for report in reports:
        for problem in filter(None, (report.error, *report.notes)):
            _log.warning("plug-in %s of %s: %s", report.name, report.distribution, problem)
    return Registry(named, reports)


def candidates(distributions: Iterable[metadata.Distribution]) -> Iterator[Candidate]:
    """Everything that is announced in our entry-point group: our own first, then by distribution.

    The order does not depend on the import path. The same entry-point name in a second
    distribution becomes `distribution:name`.
    """
    announced: dict[str, list[Candidate]] = {}
    for distribution in distributions:
        try:
            owner = normalised(distribution.name)
            if owner in announced:  # a second copy further down the path, which import ignores too
                continue
            announced[owner] = [
                Candidate(entry.name, owner, distribution.version, entry)
                for entry in distribution.entry_points
                if entry.group == GROUP
            ]
        except Exception as error:  # leftovers of a broken installation: no name, no metadata
            _log.debug("%r was not searched for plug-ins: %s", distribution, error)
    ours = announced.pop(OURS, []) or list(_uninstalled())
    names: set[str] = set()
    for candidate in [*ours, *(c for _, several in sorted(announced.items()) for c in several)]:
        if candidate.name in names:
            candidate = replace(candidate, name=f"{candidate.distribution}:{candidate.name}")
        names.add(candidate.name)
        yield candidate


def normalised(name: str) -> str:
    """The name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _uninstalled() -> Iterator[Candidate]:
    """Our own plug-ins where the package is on the path without having been installed."""
    from vlp_plugins.runtime.version import __version__

    for name, module in _OUR_ENTRY_POINTS.items():
        yield Candidate(name, OURS, __version__, metadata.EntryPoint(name, module, GROUP))


def _blocked(found: Iterable[Candidate], block: str) -> set[str]:
    outsiders = [candidate for candidate in found if not candidate.builtin]
    blocked: set[str] = set()
    for word in filter(None, (word.strip() for word in block.split(","))):
        matching = {
            c.name
            for c in outsiders
            if word == "all"
            or word in (c.name, c.entry_point.name)
            or normalised(word) == c.distribution
        }
        if not matching and word != "all":
            known = [name for c in outsiders for name in (c.name, c.distribution)]
            _log.warning(
                "%s: no outside plug-in or distribution is called %r%s",
                BLOCK_VARIABLE,
                word,
                suggest(word, known) if known else "",
            )
        blocked |= matching
    return blocked


def _offers_of(candidate: Candidate) -> list[Offer]:
    what = f"plug-in {candidate.name!r} of {candidate.distribution}, while it is imported,"
    with nullcontext() if candidate.builtin else time_limit(what):
        offered = collect(candidate.entry_point.load())
    return [
        Offer(kind, name, factory, candidate.name, candidate.distribution, candidate.builtin)
        for kind, factories in offered.items()
        for name, factory in factories.items()
    ]


def _report(
    candidate: Candidate, named: list[tuple[str, Offer]], error: str | None, blocked: bool
) -> PluginReport:
    mine = [(public, offer) for public, offer in named if offer.plugin == candidate.name]
    everything = [offer for _, offer in named]
    notes = (_clash_note(offer, public, everything) for public, offer in mine)
    names = {kind: tuple(sorted(p for p, offer in mine if offer.kind == kind)) for kind in KINDS}
    return PluginReport(
        candidate.name,
        candidate.distribution,
        candidate.version,
        registered={kind: listed for kind, listed in names.items() if listed},
        error=error,
        notes=tuple(note for note in notes if note),
        blocked=blocked,
    )


def _public_name(offer: Offer, offers: Sequence[Offer]) -> str:
    """The bare name for what has no rivals and for built-ins, else `distribution:name`."""
    rivals = _rivals(offer, offers)
    if not rivals or (offer.builtin and not any(rival.builtin for rival in rivals)):
        return offer.name
    if any(rival.distribution == offer.distribution for rival in rivals):
        return f"{offer.distribution}:{offer.plugin}:{offer.name}"
    return offer.qualified


def _rivals(offer: Offer, offers: Sequence[Offer]) -> list[Offer]:
    """The others of its name; one distribution may give it to a scorer, a solver and a method."""
    return [
        other
        for other in offers
        if other is not offer
        and other.name == offer.name
        and _name_space(other) == _name_space(offer)
        and (other.kind == offer.kind or other.distribution != offer.distribution)
    ]


def _clash_note(offer: Offer, public: str, offers: Sequence[Offer]) -> str | None:
    """What `vlp plugins` says about an offer that could not keep its name."""
    if public == offer.name:
        return None
    owners = sorted({_describe(other) for other in _rivals(offer, offers)})
    return (
        f"{SINGULAR[offer.kind]} {offer.name!r} clashes with {' and '.join(owners)}: use {public!r}"
    )


def _name_space(offer: Offer) -> str:
    return "methods" if offer.kind in METHOD_KINDS else offer.kind


def _describe(offer: Offer) -> str:
    kind = SINGULAR[offer.kind]
    return f"the built-in {kind}" if offer.builtin else f"the {kind} of {offer.distribution}"


@takes_model
def recall_adapter(model: nn.Module, name: str, settings: Mapping[str, Any]) -> Adapter:
    """The adapter that a manifest names; if it does not claim the model, the one that does.

    A `ModuleAdapter`, whose name is `module`, is made from its settings.

    Raises:
        UnclaimedModelError: if no adapter claims the model.
        MaskError: if a `ModuleAdapter` with these settings does not fit the model.
    """
    if name == MODULE:
        try:
            return ModuleAdapter(model, **settings)
        except (UnsupportedError, TypeError) as error:
            raise MaskError(
                f"these masks do not fit {type(model).__name__}: their adapter was "
                f"ModuleAdapter(model, {_keywords(settings)}), and {error}; use masks made for a "
                "model of this structure"
            ) from error
    known = registry()
    if name in known.adapter_names():
        named = _made(known, name, settings) if settings else known.adapter(name)
        if named.claims(model):
            return named
    return known.adapter_for(model)


def _made(known: Registry, name: str, settings: Mapping[str, Any]) -> Adapter:
    try:
        return known.adapter(name, settings)
    except (UnknownNameError, UnsupportedError) as error:
        raise MaskError(
            f"these masks were made with adapter {name!r} and {_keywords(settings)}, but {error}; "
            "use the version of its plug-in that they were made with"
        ) from error


def _keywords(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items() if value)
