"""Scorers, methods, adapters and hosts by name, and the adapter of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from vlp_plugins.adapter import Adapter
from vlp_plugins.plugins.making import make
from vlp_plugins.plugins.offers import KINDS, SINGULAR, Kind, Offer
from vlp_plugins.plugins.reports import PluginReport
from vlp_plugins.runtime.errors import (
    UnclaimedModelError,
    UnknownNameError,
    UnsupportedError,
    suggest,
)
from vlp_plugins.runtime.model_state import takes_model

_log = logging.getLogger(__name__)


class Registry:
    """What all plug-ins together offer.

    Every name may also be written in full, `distribution:name`; that stays right when another
    plug-in that offers the same name is installed later.
    """

    def __init__(
        self, offers: Sequence[tuple[str, Offer]], reports: Sequence[PluginReport] = ()
    ) -> None:
        """Keeps offers with the names that they go by, and what became of every plug-in."""
        self._offers: Mapping[Kind, dict[str, Offer]] = {kind: {} for kind in KINDS}
        for public, offer in offers:
            self._offers[offer.kind][public] = offer
        self._reports = list(reports)

    def adapter(self, name: str) -> Adapter:
        """A new adapter.

        Raises:
            UnknownNameError: if there is no such adapter.
            UnsupportedError: if the plug-in offers something that is no adapter.
        """
        return make(self.find(name, "adapters"), {}, Adapter)  # type: ignore[type-abstract]

    @takes_model
    def adapter_for(self, model: nn.Module) -> Adapter:
        """The adapter that claims a model.

        Outsiders are asked first, so that they can replace a built-in adapter. One that raises
        while it is asked is reported in the log and skipped.

        Raises:
            UnclaimedModelError: if no adapter claims the model.
            UnsupportedError: if several outsiders (or several built-ins) claim it.
        """
        failures: dict[str, str] = {}
        for builtin in (False, True):
            claimed = dict(self._claims(model, builtin, failures))
            if len(claimed) == 1:
                return next(iter(claimed.values()))
            if claimed:
                raise UnsupportedError(
                    f"adapters {' and '.join(map(repr, claimed))} all claim "
                    f"{type(model).__name__}; choose one with adapter={next(iter(claimed))!r}"
                )
        failed = "".join(f"; adapter {name!r} failed: {why}" for name, why in failures.items())
        raise UnclaimedModelError(
            f"no adapter claims {type(model).__name__} (asked: "
            f"{', '.join(self.adapter_names()) or 'none is registered'}){failed}; describe the "
            "model with adapter=ModuleAdapter(model, loss=..., modalities={regex: name})"
        )

    def host(self, name: str) -> Any:
        """The integration of a pruning framework, which is imported now.

        Raises:
            UnknownNameError: if there is no such host.
            UnsupportedError: if the framework is not installed.
        """
        try:
            return make(self.find(name, "hosts"), {}, object)
        except ImportError as error:
            raise UnsupportedError(f"host {name!r} cannot be used: {error}") from error

    def find(self, name: str, *kinds: Kind) -> Offer:
        """The offer of that name, of the first kind that has it.

        Raises:
            UnknownNameError: if there is none.
        """
        for kind in kinds:
            if name in self._offers[kind]:
                return self._offers[kind][name]
        offers = [item for kind in kinds for item in self._offers[kind].items()]
        in_full = [offer for _, offer in offers if offer.qualified == name]
        if len({offer.kind for offer in in_full}) == len(in_full) > 0:
            return in_full[0]
        what = SINGULAR[kinds[0]]
        alike = [public for public, offer in offers if name in (offer.name, offer.qualified)]
        if alike:
            raise UnknownNameError(
                f"{what} {name!r} must be named in full: {' or '.join(map(repr, alike))}"
            )
        known = [public for public, _ in offers]
        skipped = [report.name for report in self._reports if report.status != "ok"]
        raise UnknownNameError(
            f"no {what} is called {name!r}"
            + (suggest(name, known) if known else f" (no {what} is registered)")
            + (f"; skipped plug-ins: {', '.join(skipped)} (see `vlp plugins`)" if skipped else "")
        )

    def scorer_names(self) -> list[str]:
        """Names of all scorers, sorted."""
        return sorted(self._offers["scorers"])

    def method_names(self) -> list[str]:
        """Names that `method` takes, those of scorers among them, sorted."""
        return sorted({*self._offers["methods"], *self._offers["scorers"]})

    def adapter_names(self) -> list[str]:
        """Names of all adapters, sorted."""
        return sorted(self._offers["adapters"])

    def host_names(self) -> list[str]:
        """Names of all hosts, sorted."""
        return sorted(self._offers["hosts"])

    def plugins(self) -> list[PluginReport]:
        """What became of every plug-in; `plugin_report.plugins_table` makes a table of it."""
        return list(self._reports)

    def _claims(
        self, model: nn.Module, builtin: bool, failures: dict[str, str]
    ) -> Iterator[tuple[str, Adapter]]:
        for name, offer in self._offers["adapters"].items():
            if offer.builtin is not builtin:
                continue
            try:
                adapter = self.adapter(name)
                if adapter.claims(model):
                    yield name, adapter
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"
                _log.warning(
                    "adapter %r of %s was skipped for %s: %s",
                    name,
                    offer.distribution,
                    type(model).__name__,
                    failures[name],
                )
