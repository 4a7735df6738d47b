"""The intrinsic dimension of every prunable layer of a model, within a memory budget."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import distributed, nn

from vlp_plugins.calibration.batches import named_batches
from vlp_plugins.calibration.moments import Site
from vlp_plugins.calibration.outputs import OutputProbe, Padding
from vlp_plugins.calibration.tokens import check_reached, named
from vlp_plugins.dimension.data_pass import Pass, PassProgress, Progress, Reader
from vlp_plugins.dimension.points import LayerUse, Points, Sites
from vlp_plugins.dimension.profile import IdProfile, LayerDimension
from vlp_plugins.dimension.twonn import ConstantError, Estimate, Estimator, estimate
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import Format, made_by
from vlp_plugins.runtime.checkpoint import Checkpoint
from vlp_plugins.runtime.distributed import (
    all_gather,
    all_reduce_min,
    batch_shard,
    check_same,
    failing_together,
    rank_and_size,
)
from vlp_plugins.runtime.errors import StatisticsError, check_known
from vlp_plugins.runtime.memory import usable_bytes
from vlp_plugins.runtime.offload import device_of
from vlp_plugins.runtime.sharding import at_rest, is_sharded
from vlp_plugins.runtime.untrusted import read_as

logger = logging.getLogger("vlp_plugins.dimension")

NAME = "intrinsic-dimensions.safetensors"
"""Of the file in the workplace."""

FORM = Format(
    "checkpoint", "vlp_dimensions", 1, StatisticsError, "delete it, or start again without resume"
)


@dataclass(frozen=True, slots=True)
class Dimension:
    """The dimension of one use of a weight, from so many points of `ambient` numbers each.

    `estimate` is None where the points do not vary from sample to sample.
    """

    estimate: Estimate | None
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
    """Inverse of `pack`; `ValueError` if it is something else."""
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
    logger.info("resumed: %d of %d are known", len(state.found), len(state.sites))
    return state


def _use(record: Mapping[str, Any]) -> LayerUse:
    site = Site.parse(read_as(str, record["site"], "site"))
    return read_as(LayerUse, {**record, "site": asdict(site)}, "a site")


PUBLISHED_BLOCKS = 20


def default_settings(*, published: bool) -> tuple[Estimator, Padding]:
    """The estimator, and what points hold at positions of padding."""
    if published:
        return Estimator(blocks=PUBLISHED_BLOCKS, duplicates="exact"), "published"
    return Estimator(), "real"


def compute(
    chosen: Sequence[Site],
    points: dict[Site, Points],
    sites: Sites,
    estimator: Estimator,
    device: torch.device,
    *,
    complete: bool,
) -> dict[Site, Dimension]:
    """The dimension of each of some layers, the same ones in all processes, as is the result.

    Points of this process, absent for a layer that its batches did not reach, are emptied
    meanwhile. If they are not `complete`, they are those of its batches, and the processes take
    turns in receiving all points of a layer.

    Raises:
        VlpError: if a dimension cannot be estimated; names the layer.
    """
    rank, processes = rank_and_size()
    found: dict[Site, Dimension] = {}
    for first in range(0, len(chosen), processes):
        group = chosen[first : first + processes]
        mine: torch.Tensor | None = None
        for process, site in enumerate(group):
            own = points.pop(site, None)
            if not complete:
                together = _together(own, process, device)
            else:
                together = None if own is None else own.values
            if process == rank:
                mine = together
            del own, together
        result = None
        with failing_together():
            if mine is not None:
                layer = sites[group[rank]]
                try:
                    estimated = estimate(mine, estimator, what=f"points of {layer}")
                except ConstantError:
                    estimated = None
                result = Dimension(estimated, layer.ambient, len(mine))
        mine = None
        found |= {
            site: value for site, value in zip(group, all_gather(result), strict=False) if value
        }
    return found


def _together(own: Points | None, receiver: int, device: torch.device) -> torch.Tensor | None:
    """The points of all processes in the order of their batches, in one of them; None elsewhere."""
    rank, _ = rank_and_size()
    shares = all_gather(None if own is None else (own.widths, own.batches, own.dtype))
    known = [share for share in shares if share is not None]
    calls = max(len(widths) for widths, _, _ in known)
    padded = [widths + (0,) * (calls - len(widths)) for widths, _, _ in known]
    widths = [max(column) for column in zip(*padded, strict=True)]
    batches = sorted(
        (batch, size, who, where)
        for who, share in enumerate(shares)
        for where, (batch, size) in enumerate(share[1] if share else ())
    )
    values = None
    if rank == receiver:
        samples = sum(size for _, size, _, _ in batches)
        values = torch.empty(samples, sum(widths), dtype=known[0][2], device=device)
    start = 0
    for _, size, who, where in batches:
        if who == rank and own is not None:
            rows = own.of_batch(where, widths)
            if values is None:
                distributed.send(rows.to(_link(rows)).view(torch.uint8), dst=receiver)
            else:
                values[start : start + size] = rows
        elif values is not None:
            _receive(values[start : start + size], who)
        start += size
    return values


def _receive(rows: torch.Tensor, sender: int) -> None:
    """Fills contiguous rows."""
    device = _link(rows)
    got = rows if rows.device == device else torch.empty_like(rows, device=device)
    distributed.recv(got.view(torch.uint8), src=sender)
    if got is not rows:
        rows.copy_(got)


def _link(rows: torch.Tensor) -> torch.device:
    """Where the process group takes tensors; as bytes, because not every dtype may travel."""
    return rows.device if distributed.get_backend() == "nccl" else torch.device("cpu")


def measure(
    model: nn.Module,
    adapter: Adapter,
    weights: WeightMap,
    batches: Iterable[Batch],
    *,
    estimator: Estimator | None = None,
    padding: Padding | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    published: bool = False,
    limit: int | None = None,
    workplace: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> IdProfile:
    """Estimates the dimension of the outputs of every prunable layer. The model is left as it was.

    The arguments are those of `measure_id`, with the `WeightMap` of the model.

    A point is the output of a layer for one sample, its tokens one after the other; if its module
    is called several times in a stream, the calls are side by side. With `published` padding it
    holds what the layer gives out at the positions of padding, too, and only batches are filled up
    with zeros to the longest, as in the published code; there the same text is another point in
    another batch. Points of as many layers as the budget allows are gathered in one pass over the
    batches; the others in further passes, which run the streams up to their last layer only. The
    result depends neither on the budget nor on how samples are put into batches. A layer whose
    output does not vary from sample to sample (it reads learned queries alone) has no dimension:
    the profile and a warning name it.

    In a process group every process must be given the same batches in the same order; process r
    runs those whose index is r modulo the number of processes, the layers are divided among them
    for the estimation, and all return the same profile. A model under `fully_shard` runs every
    batch in all processes at once. The budget is that of a process; a file in the workplace keeps
    what is known after every pass, so that an interruption costs the pass at work.

    Raises:
        DataError: if there are no batches, or not the same ones in every pass.
        BatchError: if an output does not fit the samples of its batch or the mask of its tokens.
        NonFiniteError: if an output holds NaN or infinity; names the batch and the layer.
        UnsupportedError: if a single layer does not fit into the budget.
        StatisticsError: if a weight was reached by no stream, there are too few points, no output
            varies, or the file in the workplace is damaged or of another run.
        OutputError: if it cannot be written.
    """
    usual = default_settings(published=published)
    estimator, padding = estimator or usual[0], padding or usual[1]
    check_known("padding", padding, get_args(Padding))
    at_rest(model)
    sharded = is_sharded(model.parameters())
    device = device_of(model)
    settings = {
        "estimator": asdict(estimator),
        "padding": padding,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "published": published,
    }
    file = file_of(workplace, weights, settings, resume=resume)
    state = resumed(file, resume=resume)
    if memory_budget is None:
        memory_budget = all_reduce_min(usable_bytes(device, 0))
    reader = Reader(named_batches(batches, adapter), limit, state.hashes, state.sizes)
    probe = OutputProbe(model, adapter, weights, padding=padding, published=published)
    counter = PassProgress(progress, reader.total)
    # A pass that had to give up all of its layers knows more about their sizes than the one before,
    # so there is an end.
    with probe.attached():
        while not state.hashes or state.left:
            turn = batch_shard(sharded=sharded)
            this = Pass(probe, state.sites, state.left, memory_budget, dtype, turn)
            points = this.run(reader, counter)
            if not state.hashes:
                check_same(reader.hashes[-1], f"{len(reader.hashes)} batches")
            state.hashes, state.sizes = reader.hashes, reader.sizes
            logger.info("a pass gathered points of %d layers", len(this.group))
            complete = sharded or rank_and_size()[1] == 1
            state.found |= compute(
                this.group, points, state.sites, estimator, device, complete=complete
            )
            counter.passes += 1
            if file is not None:
                file.save(lambda: pack(state))
        if not counter.passes:  # all was known; make sure that it is about these batches
            for _ in reader:
                pass
    check_measured(adapter, weights, state.sites)
    return _profile(state, weights, settings)


def check_measured(adapter: Adapter, weights: WeightMap, sites: Iterable[Site]) -> None:
    """Raises `StatisticsError` if a weight has none of the outputs that ran."""
    alike = _of_one_module(weights)
    check_reached(adapter, weights, {name for site in sites for name in alike[site.weight]})


def _of_one_module(weights: WeightMap) -> dict[str, list[str]]:
    """By weight those that have the same output: matrices of one module, of its experts say."""
    by_module: dict[str, list[str]] = {}
    for name, weight in weights.items():
        views = weight.owners[0].view is not None
        by_module.setdefault(weight.owners[0].module if views else name, []).append(name)
    return {name: group for group in by_module.values() for name in group}


def _profile(state: State, weights: WeightMap, settings: Mapping[str, Any]) -> IdProfile:
    order = {name: place for place, name in enumerate(weights)}
    alike = _of_one_module(weights)
    of = [(name, site) for site in state.found for name in alike[site.weight]]
    layers: list[LayerDimension] = []
    without: dict[str, str] = {}
    for name, site in sorted(of, key=lambda each: order[each[0]]):  # stable: streams in order
        found, weight = state.found[site], weights[name]
        if found.estimate is None:
            without[name] = f"the output is equal for all {found.points:,} samples that reach it"
            continue
        layers.append(
            LayerDimension(
                weight=name,
                stream=site.stream,
                owner=site.owner,
                module=state.sites[site].module,
                modality=weight.modality,
                depth=weight.depth,
                dimension=found.estimate.dimension,
                error=found.estimate.error,
                ambient=found.ambient,
                points=found.points,
                duplicates=found.estimate.duplicates,
            )
        )
    if not layers:
        raise StatisticsError(
            f"the output of no layer varies between the {sum(state.sizes)} samples, so none has a "
            "dimension; are the samples different?"
        )
    for layer in layers:
        without.pop(layer.weight, None)  # measured in another stream
    if without:
        logger.warning(
            "the output of %s does not vary from sample to sample: no dimension; factors take the "
            "mean of the modality",
            named(weights, list(without)),
        )
    made_of = {
        "weights": weights.content_hash(),
        "samples": sum(state.sizes),
        "batches": len(state.sizes),
        "fingerprint": state.hashes[-1],
    }
    return IdProfile(
        tuple(layers),
        weights.structure,
        weights.adapter_name,
        {**settings, **made_of},
        {name: weight.shape for name, weight in weights.items()},
        without,
    )
