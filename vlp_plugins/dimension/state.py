"""What is known between two passes, and the file that a run is resumed from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlp_plugins.calibration.moments import Site
from vlp_plugins.dimension.points import LayerUse, Sites
from vlp_plugins.dimension.twonn import Estimate
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import Format, made_by
from vlp_plugins.runtime.checkpoint import Checkpoint
from vlp_plugins.runtime.distributed import failing_together
from vlp_plugins.runtime.errors import StatisticsError
from vlp_plugins.runtime.typed import read_as

logger = logging.getLogger("vlp_plugins.dimension")

NAME = "intrinsic-dimensions.safetensors"
"""Of the file in the workplace."""

FORM = Format(
    "checkpoint", "vlp_dimensions", 1, StatisticsError, "delete it, or start again without resume"
)


@dataclass(frozen=True, slots=True)
class Dimension:
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
        sites: the uses seen so far; empty before the first pass.
        found: the dimensions so far.
        hashes: of the batches; empty before the first pass.
        sizes: of the batches, in samples.
    """

    sites: Sites = field(default_factory=Sites)
    found: dict[Site, Dimension] = field(default_factory=dict)
    hashes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def left(self) -> list[LayerUse]:
        """What has no dimension yet, in the order of execution."""
        return [use for site, use in self.sites.items() if site not in self.found]


def pack(state: State) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state as a checkpoint keeps it."""
    return {}, {
        "hashes": state.hashes,
        "sizes": state.sizes,
        "sites": [{**asdict(use), "site": str(use.site)} for use in state.sites.values()],
        "found": {str(site): asdict(found) for site, found in state.found.items()},
    }


def unpack(_: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> State:
    """Inverse of `pack`.

    Raises:
        ValueError: if it is something else.
    """
    uses = (_use(each) for each in read_as(list[dict[str, Any]], content["sites"], "sites"))
    found = read_as(dict[str, Dimension], content["found"], "found")
    return State(
        Sites((use.site, use) for use in uses),
        {Site.parse(site): dimension for site, dimension in found.items()},
        read_as(tuple[str, ...], content["hashes"], "hashes"),
        read_as(tuple[int, ...], content["sizes"], "sizes"),
    )


def file_of(
    workplace: Path | None, weights: WeightMap, settings: Mapping[str, Any], *, resume: bool
) -> Checkpoint | None:
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
    return Checkpoint(workplace / NAME, FORM, identity, unit="pass")


def resumed(file: Checkpoint | None, *, resume: bool) -> State:
    """What an interrupted run knew, in all processes."""
    if file is None:
        return State()
    if not resume:
        file.begin()
        return State()
    assert file.path is not None
    with failing_together():
        earlier = file.path.with_suffix(".json")
        if earlier.exists() and not file.path.exists():
            raise StatisticsError(
                f"{earlier} was written by an earlier version, whose unfinished dimensions "
                f"{made_by()} does not resume; resume with that version, or {FORM.remedy}"
            )
    state = file.load(unpack)
    if state is None:
        return State()
    logger.info("going on: %d of %d are known", len(state.found), len(state.sites))
    return state


def _use(record: Mapping[str, Any]) -> LayerUse:
    site = Site.parse(read_as(str, record["site"], "site"))
    return read_as(LayerUse, {**record, "site": asdict(site)}, "a site")
