"""Finds plug-ins, isolates a broken one, and hands out what the others offer."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata

from vlp_plugins.plugins.clashes import clash_note, public_names
from vlp_plugins.plugins.offers import KINDS, Offer, collect
from vlp_plugins.plugins.registry import Registry
from vlp_plugins.plugins.reports import PluginReport, plugins_table
from vlp_plugins.runtime.errors import UnsupportedError, suggest

__all__ = ["GROUP", "PluginReport", "Registry", "discover", "plugins_table", "registry"]

GROUP = "vlp_plugins"
BLOCK_VARIABLE = "VLP_PLUGINS_BLOCK"
OURS = "vlp-plugins"
_OUR_ENTRY_POINTS = {"builtin": "vlp_plugins.builtin", "adapters": "vlp_adapters.plugin"}

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
            except (Exception, SystemExit) as error:
                errors[candidate.name] = _one_line(error)
    named = list(zip(public_names(offers), offers, strict=True))
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
        name = candidate.name
        if name in names:
            name = f"{candidate.distribution}:{name}"
        names.add(name)
        yield Candidate(name, candidate.distribution, candidate.version, candidate.entry_point)


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
    plugin = candidate.entry_point.load()
    return [
        Offer(kind, name, factory, candidate.name, candidate.distribution, candidate.builtin)
        for kind, factories in collect(plugin).items()
        for name, factory in factories.items()
    ]


def _report(
    candidate: Candidate, named: list[tuple[str, Offer]], error: str | None, blocked: bool
) -> PluginReport:
    mine = [(public, offer) for public, offer in named if offer.plugin == candidate.name]
    everything = [offer for _, offer in named]
    notes = (clash_note(offer, public, everything) for public, offer in mine)
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


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
