"""Compositions, score x allocation, and their masks from statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.statistic import Statistic, distinct
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import pack
from vlp_plugins.methods.method import Context, Method
from vlp_plugins.models.request import Owners, Target, resolve_owners
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.errors import StatisticsError, UnsupportedError
from vlp_plugins.runtime.parallel import in_turn, over_tensors
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation
from vlp_plugins.scoring.factors import Factors, Scaled, guided_name
from vlp_plugins.scoring.score import Evidence, Scorer
from vlp_plugins.scoring.selection import Scored, Selection
from vlp_plugins.scoring.threshold import Cut


@dataclass(frozen=True)
class Composition(Method):
    """score x allocation.

    Attributes:
        name: the name that masks and reports carry.
        score: ranks the elements within a tensor.
        allocation: decides how many elements each tensor keeps.
        allocation_score: the score that the allocation reads; None: `score`. MULTIFLOW ranks by
            information flow and allocates by magnitude.
        parameters: what the user set, for the manifest.
        factors: what multiplies the score that the allocation reads; None: nothing. See
            `with_factors`.
    """

    name: str
    score: Scorer
    allocation: Allocation = field(default_factory=GlobalAllocation)
    allocation_score: Scorer | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    factors: Factors | None = None

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that the data pass must gather, each once.

        Raises:
            UnsupportedError: if the scores need different statistics of one name.
        """
        read = (*self.score.needs, *(self.allocation_score.needs if self.allocation_score else ()))
        return distinct(read)

    @property
    def reads_data(self) -> bool:
        return bool(self.needs)

    def run(self, context: Context) -> list[Masks]:
        return self.masks(context, self.gather(context))

    def check(self, context: Context) -> None:
        if self.needs and context.statistics is None and not context.has_batches:
            raise StatisticsError(
                f"method {self.name!r} needs data: give batches, or statistics of an earlier pass"
            )

    def gather(self, context: Context, *, keep_state: bool = False) -> Statistics | None:
        """What the scores read: the statistics of the context, or of a pass over its batches.

        Args:
            context: of the run.
            keep_state: see `calibrate`.

        Returns:
            None if the scores read nothing.

        Raises:
            VlpError: see `calibrate`.
        """
        if not self.needs or context.statistics is not None:
            return context.statistics if self.needs else None
        return calibrate(
            context.model,
            context.adapter,
            context.weights,
            context.batches,
            self.needs,
            published=context.published,
            autocast=context.autocast,
            skip_nonfinite=context.skip_nonfinite,
            keep_state=keep_state,
            limit=context.limit,
            checkpoint=context.checkpoint,
            checkpoint_every=context.checkpoint_every,
            resume=context.resume,
            progress=context.progress,
        )

    def masks(
        self, context: Context, statistics: Statistics | None, *, half: int | None = None
    ) -> list[Masks]:
        """Masks for every target of the context from statistics; see `make_masks`."""
        return make_masks(
            context.weights,
            self,
            context.targets,
            statistics,
            floor=context.floor,
            owners=context.owners,
            published=context.published,
            seed=context.seed,
            half=half,
        )

    def with_allocation(self, allocation: Allocation | None) -> Composition:
        if allocation is None:
            return self
        if self.factors is not None:
            allocation = allocation.with_factors(self.factors)
        return replace(self, allocation=allocation)

    def with_factors(self, factors: Mapping[str, float]) -> Composition:
        if self.factors is not None:
            raise UnsupportedError(f"method {self.name!r} has factors already")
        factors = Factors.of(factors)
        return replace(
            self,
            name=guided_name(self.name),
            allocation=self.allocation.with_factors(factors),
            parameters={**self.parameters, **factors.record()},
            factors=factors,
        )


def composed(method: Method) -> Composition:
    """The method, if it is a composition: masks from statistics of one pass over the data.

    Raises:
        UnsupportedError: if it is a procedure.
    """
    if isinstance(method, Composition):
        return method
    raise UnsupportedError(
        f"method {method.name!r} runs the model as it goes: there are no statistics that one pass "
        "over the data could gather for it, or that two masks could be made from; prune with it "
        "directly"
    )


def make_masks(
    weights: WeightMap,
    method: Composition,
    targets: Sequence[Target],
    statistics: Statistics | None = None,
    *,
    floor: float = 0.0,
    owners: Owners | None = None,
    published: bool = False,
    seed: int = 0,
    half: int | None = None,
) -> list[Masks]:
    """Masks for every target from statistics that exist already; reads no data.

    Args:
        weights: the prunable weights.
        method: what to apply.
        targets: sparsities.
        statistics: what the method needs, None if it needs nothing.
        floor: least fraction that every tensor keeps.
        owners: see `prune`.
        published: see `prune`.
        seed: see `prune`.
        half: 0 or 1 uses the statistics of every other batch only; comparing the two masks tells
            whether the data was enough.

    Raises:
        StatisticsError: if a statistic is missing or is of another model.
        SparsityError: if a target cannot be met.
        NonFiniteError: if weights or scores hold NaN or infinity.
    """
    weights.check_finite()
    source = resolve_owners(owners, published=published)
    evidence = _evidence(
        weights, method, statistics, owners=source, published=published, seed=seed, half=half
    )
    ranked = Scored(method.score, weights, evidence, published)
    allocated = Scored(method.allocation_score or method.score, weights, evidence, published)
    if method.factors is not None:
        method.factors.check(weights)
        allocated = replace(allocated, scorer=Scaled(allocated.scorer, method.factors))
    if method.allocation_score is None:
        ranked = allocated
    with in_turn(weights.sharded):
        selections = method.allocation.select(allocated, targets, floor=floor)
    ranked = ranked.ranking()

    def bits_of(weight: Weight) -> list[torch.Tensor]:
        scores = ranked.scores(weight.name)
        chosen = [selection[weight.name] for selection in selections]
        if method.allocation_score is not None:
            chosen = _recut(ranked, scores, chosen, weight)
        return [pack(selection.mask(scores).view(weight.shape)) for selection in chosen]

    with in_turn(weights.sharded):
        bits = over_tensors(bits_of, weights.values(), ranked.device)
    packed = [dict(zip(weights, each, strict=True)) for each in zip(*bits, strict=True)]
    manifest = Manifest.for_weights(
        weights,
        method=method.name,
        parameters=_parameters(method, floor=floor, owners=source, published=published),
        seed=seed,
        calibration=_calibration(statistics if method.needs else None),
    )
    asked = [dict(target) if isinstance(target, Mapping) else target for target in targets]
    return [
        Masks(bits, replace(manifest, sparsity=sparsity))
        for bits, sparsity in zip(packed, asked, strict=True)
    ]


def _evidence(
    weights: WeightMap,
    method: Composition,
    statistics: Statistics | None,
    *,
    owners: Owners,
    published: bool,
    seed: int,
    half: int | None,
) -> dict[str, Evidence]:
    if not method.needs:
        return {name: Evidence(name, seed) for name in weights}
    if statistics is None:
        raise StatisticsError(f"method {method.name!r} needs statistics; run the data pass first")
    statistics.check(weights, published=published)
    missing = [s.name for s in method.needs if s.name not in statistics.names()]
    if missing:
        raise StatisticsError(
            f"method {method.name!r} needs {', '.join(missing)}; the statistics hold "
            f"{', '.join(sorted(statistics.names()))}: repeat the data pass for this method"
        )
    return {
        name: Evidence(
            name,
            seed,
            {s.name: statistics.mean(s.name, name, owners=owners, half=half) for s in method.needs},
        )
        for name in weights
    }


def _recut(
    ranked: Scored, scores: torch.Tensor, selections: Sequence[Selection], weight: Weight
) -> list[Selection]:
    """The same counts by the ranking score; rows and patterns are chosen by it anyway."""
    if not all(isinstance(selection, Cut) for selection in selections):
        return list(selections)
    counts = [selection.remove for selection in selections]
    if ranked.published:
        counts = [_published_count(count, weight.numel) for count in counts]
    return list(ranked.cuts_of(scores, counts))


def _published_count(removed: int, numel: int) -> int:
    """Quirk multiflow-M6: the published code passes the count through a fraction."""
    return int((1 - (numel - removed) / numel) * numel)


def _parameters(
    method: Composition, *, floor: float, owners: Owners, published: bool
) -> dict[str, Any]:
    return {
        **method.parameters,
        **method.allocation.record(),
        "floor": floor,
        "owners": owners,
        "variant": "published" if published else "default",
    }


def _calibration(statistics: Statistics | None) -> dict[str, Any] | None:
    if statistics is None:
        return None
    return {
        "fingerprint": statistics.fingerprint,
        "batches": statistics.batches,
        "samples": sum(statistics.samples),
        "tokens": "real ones, by the adapter"
        + (" as in the published code" if statistics.published else ""),
    }
