"""What is known between two passes, and the file that keeps it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlp_plugins.calibration.statistic import Site
from vlp_plugins.dimension.points import Met, Sites
from vlp_plugins.dimension.twonn import Estimate
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import read_json, write_json
from vlp_plugins.runtime.distributed import broadcast, failing_together, rank_and_size
from vlp_plugins.runtime.errors import StatisticsError

logger = logging.getLogger("vlp_plugins.dimension")

NAME = "intrinsic-dimensions.json"
"""Of the file in the workplace."""

_KIND = "unfinished intrinsic dimensions"
_REMEDY = "delete it, or start again without resume"


@dataclass(frozen=True, slots=True)
class Found:
    """The dimension of one use of a weight.

    Attributes:
        estimate: what the estimator found.
        ambient: numbers in a point.
        points: number of samples.
    """

    estimate: Estimate
    ambient: int
    points: int


@dataclass
class State:
    """After some passes.

    Attributes:
        sites: what was met; empty before the first pass.
        found: the dimensions so far.
        hashes: of the batches; empty before the first pass.
        sizes: of the batches, in samples.
    """

    sites: Sites = field(default_factory=Sites)
    found: dict[Site, Found] = field(default_factory=dict)
    hashes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def left(self) -> list[Met]:
        """What has no dimension yet, in the order of execution."""
        return [met for site, met in self.sites.items() if site not in self.found]


class StateFile:
    """The file of a run; process 0 writes and reads it."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Finds its place.

        Args:
            folder: the workplace.
            identity: what a run must have in common with the one that it goes on from.
        """
        self.path = folder / NAME
        self._identity = dict(identity)

    def save(self, state: State) -> None:
        """Writes what is known, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        content = {
            "identity": self._identity,
            "hashes": state.hashes,
            "sizes": state.sizes,
            "sites": [{**asdict(met), "site": str(met.site)} for met in state.sites.values()],
            "found": {str(site): asdict(found) for site, found in state.found.items()},
        }
        write_json(self.path, _KIND, content, state=True)
        logger.debug("wrote %s: %d of %d", self.path, len(state.found), len(state.sites))

    def load(self) -> State:
        """Reads what is known; nothing if there is no file.

        Raises:
            StatisticsError: if it is damaged, or of another model or other settings.
        """
        if not self.path.exists():
            logger.warning("no %s; starting from the first pass", self.path)
            return State()
        content = read_json(self.path, _KIND, _REMEDY)
        try:
            theirs = dict(content["identity"])
            state = State(
                Sites((met.site, met) for met in map(_met, content["sites"])),
                {Site.parse(site): _found(value) for site, value in content["found"].items()},
                tuple(map(str, content["hashes"])),
                tuple(map(int, content["sizes"])),
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise StatisticsError(
                f"{self.path} is damaged ({type(error).__name__}: {error}); {_REMEDY}"
            ) from error
        for key, mine in self._identity.items():
            if theirs.get(key) != mine:
                raise StatisticsError(
                    f"{self.path} is of another run: its {key} is {theirs.get(key)!r}, this one's "
                    f"is {mine!r}; give the same model and settings, or {_REMEDY}"
                )
        logger.info("going on: %d of %d are known", len(state.found), len(state.sites))
        return state


def file_of(
    workplace: Path | None, weights: WeightMap, settings: Mapping[str, Any], *, resume: bool
) -> StateFile | None:
    """The file of a run; None without a workplace.

    Raises:
        StatisticsError: if there is none to resume from.
    """
    if workplace is None:
        if resume:
            raise StatisticsError("resume needs the workplace of the earlier run; give it")
        return None
    identity = {
        "adapter": weights.adapter_name,
        "structure": weights.structure,
        "weights": weights.content_hash(),
        **settings,
    }
    return StateFile(workplace, identity)


def resumed(file: StateFile | None, *, resume: bool) -> State:
    """What an interrupted run knew, in all processes."""
    state = State()
    with failing_together():
        if file is not None and not rank_and_size()[0]:
            if resume:
                state = file.load()
            elif file.path.exists():
                logger.warning("%s is not resumed and will be overwritten", file.path)
    return broadcast(state)


def _met(record: Mapping[str, Any]) -> Met:
    widths = tuple(map(int, record["widths"]))
    return Met(Site.parse(record["site"]), str(record["module"]), widths, int(record["itemsize"]))


def _found(record: Mapping[str, Any]) -> Found:
    estimate = record["estimate"]
    return Found(
        Estimate(
            float(estimate["dimension"]),
            float(estimate["error"]),
            int(estimate["used"]),
            tuple(map(float, estimate["block_dimensions"])),
            tuple(map(float, estimate["block_deviations"])),
            int(estimate.get("duplicates", 0)),  # of older files, refused for their settings
        ),
        int(record["ambient"]),
        int(record["points"]),
    )
