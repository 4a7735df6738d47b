"""sensitivity(): prunes one group of weights at a time and measures what is left of the model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vlp_plugins.calibration.batches import batch_size, chain_hash, check_batches, named_batches
from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.methods.composition import Composition, composed
from vlp_plugins.methods.guided import IdGuided
from vlp_plugins.methods.method import Context, Method
from vlp_plugins.methods.reconstruction.layer import Solver
from vlp_plugins.methods.resolve import (
    resolve_adapter,
    resolve_method,
    resolve_profile,
    with_profile,
)
from vlp_plugins.models.adapter import Adapter, Batch, RetrievalAdapter
from vlp_plugins.models.request import (
    Owners,
    Variant,
    check_sparsity,
    checked_arguments,
    is_published,
)
from vlp_plugins.models.saving import restored
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.distributed import (
    all_gather,
    failing_together,
    rank_and_size,
    wait_for_all,
)
from vlp_plugins.runtime.errors import (
    DataError,
    NonFiniteError,
    SparsityError,
    StatisticsError,
    UnsupportedError,
)
from vlp_plugins.runtime.model_state import neutral_state, takes_model
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.tasks.retrieval import retrieval
from vlp_plugins.tasks.sensitivity.curves import Curve, Group, Point, Sensitivity, groups_of
from vlp_plugins.tasks.sensitivity.files import Key, PointsFile, key_of


class Evaluator:
    """Measures a model; the same model gives the same figures every time."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        weights: WeightMap,
        batches: Sequence[Batch],
        *,
        retrieve: bool,
    ) -> None:
        """Nothing is run yet; the model is left as it is found, with what its losses change.

        R@1 among all pairs is measured, too, if that is asked for and the adapter embeds images and
        texts.
        """
        self._model = model
        self._adapter = adapter
        self._batches = batches
        self._probe = LossProbe(model, adapter, weights)
        self.retrieves = retrieve and isinstance(adapter, RetrievalAdapter)

    def dense(self) -> Point:
        """The model as it was; `NonFiniteError` if its loss on a batch is not finite."""
        point = self.measure(0.0, 0)
        for index, loss in enumerate(point.losses):
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of the dense model on batch {index} is NaN or infinite; look at "
                    "that batch and at the checkpoint"
                )
        return point

    def measure(self, sparsity: float, removed: int) -> Point:
        """The model as it is now, of which so many elements were removed."""
        with self._probe.attached(()) as probe:
            losses = tuple(probe.loss(batch, index) for index, batch in enumerate(self._batches))
        if not self.retrieves:
            return Point(sparsity, removed, losses)
        recall = retrieval(self._model, self._adapter, self._batches, ks=(1,)).final
        return Point(sparsity, removed, losses, recall.image_to_text[1], recall.text_to_image[1])


def _missing_points(
    method: Composition,
    context: Context,
    evaluator: Evaluator,
    groups: Sequence[Group],
    sparsities: Sequence[float],
    known: Mapping[Key, Point],
    record: PointsFile,
    progress: Progress | None,
) -> dict[Key, Point]:
    """Prunes and measures the points that are not known; of several processes each its share.

    The allocation sees a group as if it were the whole model.
    """
    weights, statistics = context.weights, context.statistics
    rank, world = rank_and_size()
    missing = [(g, s) for g in groups for s in sparsities if key_of(g, s) not in known]
    mine = missing[rank::world]
    found: dict[Key, Point] = {}
    for group in groups:
        wanted = [s for other, s in mine if other is group]
        if not wanted:
            continue
        chosen = {name: weights[name] for name in group.weights}
        part = WeightMap(
            chosen, weights.adapter_name, weights.adapter_settings, weights.model_elements
        )
        own = statistics
        if statistics is not None:  # the same sums, as those of a model that has these weights only
            shapes = {name: weight.shape for name, weight in part.items()}
            own = replace(statistics, structure=part.structure, shapes=shapes, weights_hash="")
        made = method.masks(replace(context, weights=part, targets=wanted), own)
        for target, masks in zip(wanted, made, strict=True):
            with restored(part):
                for name in masks:
                    with part[name].changing() as parameter:
                        masks.pruned(name).write(parameter)
                point = evaluator.measure(target, masks.removed)
            found[key_of(group, target)] = point
            record.add(group, point)
            if progress is not None:
                progress(len(found), len(mine))
    return found


SPARSITIES = (0.3, 0.5, 0.63, 0.75, 0.85, 0.9, 0.95)


@checked_arguments
@neutral_state()
@takes_model
def sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    calibration: Iterable[Batch] | None = None,
    adapter: Adapter | str | None = None,
    method: str | Scorer | Solver | Method = "omp",
    sparsity: Sequence[float] = SPARSITIES,
    groups: Sequence[str] = ("modality", "block"),
    modalities: Sequence[str] | None = None,
    allocation: Allocation | str | None = None,
    owners: Owners | None = None,
    variant: Variant = "default",
    id_profile: IdProfile | str | Path | None = None,
    seed: int = 0,
    retrieve: bool = True,
    workplace: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **parameters: Any,
) -> Sensitivity:
    """How a model takes the pruning of each of its parts, all others staying dense.

    Every point (group, sparsity) zeroes weights of the group, measures the pre-training loss and
    R@1 on the batches, and writes the dense weights back. Under `torchrun` the processes share the
    points; each must be given the same batches.

    Example:
        found = sensitivity(model, test_batches, groups=["modality"])
        for each in prunabilities(found):
            print(each.group.title, each.loss, each.tolerated)

    Args:
        model: any module that an adapter with a loss claims. It is left as it is.
        batches: what is measured on; kept in memory. The selection of weights never sees them.
        calibration: what the method reads, if it reads data.
        adapter: see `prune`.
        method: see `prune`; a `Composition`. Its allocation sees the group as if it were the whole
            model: a global one puts one threshold through a modality or block, a layer-wise one
            removes the same fraction of each of its weights.
        sparsity: fractions of a group's elements to remove, above 0.
        groups: `modality`, `block` (one modality at one depth), `weight`; in that order.
        modalities: those that are pruned; None: all.
        allocation: within a group; None: the method's own.
        owners: see `prune`.
        variant: see `prune`.
        id_profile: of the model, for methods `id*NAME`; others do not read it.
        seed: see `prune`.
        retrieve: measure R@1, too, if the adapter embeds images and texts.
        workplace: folder that keeps every point as soon as it is measured; None: keeps none.
        resume: take points from `workplace` that an interrupted run measured.
        progress: called with (points done, points in all) of this process.
        **parameters: of the method.

    Raises:
        SparsityError: for a sparsity outside (0, 1), or one that the allocation cannot meet.
        UnknownNameError: for a method, group or modality that does not exist.
        UnsupportedError: for a method that is a `Procedure`, a family without a loss, or a model
            that is sharded.
        DataError: without batches, or if `workplace` holds another run.
        StatisticsError: if the method reads data and there is no `calibration`, or dimensions and
            there is no `id_profile`.
        NonFiniteError: if the dense model's loss is not finite.
    """
    adapter = resolve_adapter(model, adapter)
    sparsities = _checked(sparsity)
    published = is_published(variant)
    weights = WeightMap.of(model, adapter)
    resolved = resolve_method(method, allocation, [], parameters)
    if isinstance(resolved, IdGuided):
        if id_profile is None:
            raise StatisticsError(
                f"method {resolved.name!r} needs the model's intrinsic dimensions: give an "
                "id_profile, which `vlp id` or measure_id() makes"
            )
        profile = resolve_profile(id_profile)
        resolved = with_profile(resolved, profile, weights, owners, published=published)
    composition = composed(resolved)
    if weights.sharded:
        raise UnsupportedError(
            "sensitivity prunes another part of the model in every process and needs whole "
            "weights in each; load the model without fully_shard"
        )
    weights.check_finite()
    chosen = groups_of(weights, groups, modalities)
    check_batches(batches, None)
    measured = list(named_batches(batches, adapter))
    if not measured:
        raise DataError("there are no batches to measure on; check the path of the data")
    if composition.needs and calibration is None:
        raise StatisticsError(
            f"method {composition.name!r} reads data: give calibration batches, other ones than "
            "those that are measured on"
        )
    context = Context(
        model,
        adapter,
        weights,
        batches=() if calibration is None else calibration,
        published=published,
        owners=owners,
        seed=seed,
    )
    context = replace(context, statistics=composition.gather(context))
    evaluator = Evaluator(model, adapter, weights, measured, retrieve=retrieve)
    settings = {
        "method": composition.name,
        "parameters": json.loads(json.dumps(composition.parameters, default=str)),
        "allocation": composition.allocation.name,
        "variant": variant,
        "owners": owners,
        "seed": seed,
        "sparsities": sparsities,
        "groups": list(groups),
        "batches": len(measured),
        "pairs": sum(map(batch_size, measured)),
        "data": _hash_of(measured),
        "calibration": None if context.statistics is None else context.statistics.fingerprint,
        "retrieval": evaluator.retrieves,
    }
    run = json.dumps([weights.structure, weights.content_hash(), settings])
    record = PointsFile(
        workplace, hashlib.sha256(run.encode()).hexdigest()[:16], rank_and_size()[0]
    )
    known = record.known() if resume else {}
    wait_for_all()  # no process may begin a file that another still reads
    record.begin(known)
    dense = evaluator.dense()
    with failing_together():
        found = _missing_points(
            composition, context, evaluator, chosen, sparsities, known, record, progress
        )
    points = {key: point for part in all_gather(found) for key, point in part.items()} | known
    curves = [Curve(g, tuple(points[key_of(g, s)] for s in sparsities)) for g in chosen]
    return Sensitivity(dense, tuple(curves), weights.structure, adapter.name, settings)


def _checked(sparsities: Sequence[float]) -> list[float]:
    found = sorted(dict.fromkeys(check_sparsity(value) for value in sparsities))
    if not found:
        raise SparsityError("no sparsities given; give for instance [0.5, 0.75, 0.9]")
    if found[0] == 0:
        raise SparsityError("sparsity 0 is the dense model, which is measured anyway; leave it out")
    return found


def _hash_of(batches: Sequence[Batch]) -> str:
    digest = b""
    for batch in batches:
        digest = chain_hash(digest, batch)
    return digest.hex()[:16]
