"""Compositions, score x allocation, and their masks from statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch

from vlp_plugins.calibration.block_gradients import GradientRows
from vlp_plugins.calibration.block_pass import BlockPass
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.moments import LossStatistic, Statistic, distinct
from vlp_plugins.calibration.selections import TokenSelection
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import Pruned, pack
from vlp_plugins.methods.blocks import (
    calibration_record,
    cost_by_blocks,
    masks_by_blocks,
    masks_of,
)
from vlp_plugins.methods.method import Context, Cost, Factored, Method, Walk
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.errors import StatisticsError, UnsupportedError
from vlp_plugins.runtime.parallel import in_turn, over_tensors
from vlp_plugins.runtime.sharding import OnDemand
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation
from vlp_plugins.scoring.factors import Factors, Scaled, guided_name
from vlp_plugins.scoring.score import Evidence, Scorer
from vlp_plugins.scoring.selection import Scored, Selection
from vlp_plugins.scoring.threshold import Cut


@dataclass(frozen=True)
class Composition(Factored):
    """score x allocation.

    Attributes:
        name: the name that masks and reports carry.
        score: ranks the elements within a tensor.
        allocation: decides how many elements each tensor keeps.
        allocation_score: the score that the allocation reads, if it has none of its own; None:
            `score`. MULTIFLOW ranks by information flow and allocates by magnitude.
        parameters: what the user set, for the manifest.
        factors: what multiplies the score that the allocation reads; None: nothing. See
            `with_factors`.
        tokens: which of the real tokens count, block by block; None: all.
    """

    walks: ClassVar[tuple[Walk, ...]] = ("model", "blocks")

    name: str
    score: Scorer
    allocation: Allocation = field(default_factory=GlobalAllocation)
    allocation_score: Scorer | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    factors: Factors | None = None
    tokens: TokenSelection | None = None
    reads_any_score: ClassVar[bool] = True

    @property
    def score_of_allocation(self) -> Scorer | None:
        """The score that the allocation reads; None: `score`."""
        return self.allocation.score or self.allocation_score

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that the data pass must gather, each once.

        Raises:
            UnsupportedError: if the scores need different statistics of one name.
        """
        return distinct(self.read)

    @property
    def read(self) -> tuple[Statistic, ...]:
        """What the scores read."""
        return (
            *self.score.needs,
            *(self.score_of_allocation.needs if self.score_of_allocation else ()),
        )

    @property
    def reads_data(self) -> bool:
        return bool(self.needs)

    @property
    def takes_gradients(self) -> bool:
        return any(isinstance(statistic, LossStatistic) for statistic in self.needs)

    def why_blocks(self, *, published: bool = False) -> str:
        """What it does block by block alone, for a message; empty if it may walk either way."""
        return "" if self.tokens is None else "chooses tokens block by block"

    def gradients(self, *, published: bool = False) -> GradientRows | None:
        """The gradients of a block that `reduced` reads, in a walk by blocks; None for none."""
        return None

    @property
    def relative_cost(self) -> str:
        if self.tokens is not None:
            return "3 per sparsity"
        return "3" if self.takes_gradients else str(int(self.reads_data))

    def statistics_bytes(self, weights: WeightMap, *, halves: bool = False) -> int:
        """What the float64 sums of `needs` take; those of the loss as `calibrate` has them."""
        sums = 0
        for need in self.needs:
            for weight in weights.values():
                of_loss = isinstance(need, LossStatistic)
                sites = 1 + halves if of_loss else 2 * len(weight.owners)
                sums += sites * need.size(weight)
        return 8 * sums

    def cost(self, context: Context) -> Cost:
        """What a walk by blocks will need; `context.limit` says how many batches there will be."""
        blocks = None
        if context.has_batches:
            blocks = BlockPass(
                context.model,
                context.adapter,
                context.weights,
                context.batches,
                published=context.published,
                limit=1,
            )
        return cost_by_blocks(self, context, blocks)

    def walk_of(self, context: Context) -> Walk:
        if reason := self.why_blocks(published=context.published):
            if context.walk == "model":
                raise UnsupportedError(
                    f"method {self.name!r} {reason}, and walk='model' runs the whole "
                    "model at a time; leave the walk out"
                )
            return "blocks"
        walk = super().walk_of(context)
        if context.tokens is not None and not self.needs:
            raise UnsupportedError(
                f"method {self.name!r} reads no inputs, so that tokens={context.tokens.name!r} "
                "changes nothing; leave it out"
            )
        return walk if self.needs else "model"  # weights alone are the same in both

    def run(self, context: Context) -> list[Masks]:
        self.check(context)
        if self.walk_of(context) == "blocks":
            return masks_by_blocks(self, context)
        return self.masks(context, self.gather(context))

    def check(self, context: Context) -> None:
        if self.walk_of(context) == "blocks":
            if context.statistics is not None:
                raise StatisticsError(
                    "a walk by blocks measures each block behind pruned ones, and cannot use "
                    "statistics of the dense model; give batches"
                )
            if not context.has_batches:
                raise StatisticsError("a walk by blocks needs data: give batches")
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
        self.check(context)
        if not self.needs or context.statistics is not None:
            return context.statistics if self.needs else None
        return gather(self.needs, context, keep_state=keep_state)

    def masks(
        self, context: Context, statistics: Statistics | None = None, *, half: int | None = None
    ) -> list[Masks]:
        """Masks for every target of the context; reads no batches.

        Args:
            context: of the run.
            statistics: what the scores read; None if they read nothing.
            half: 0 or 1 uses the statistics of every other batch only; comparing the two masks
                tells whether the data was enough.

        Raises:
            StatisticsError: if a statistic is missing or is of another model.
            SparsityError: if a target cannot be met.
            NonFiniteError: if weights or scores hold NaN or infinity.
        """
        weights = context.weights
        ranked, selections = self._selected(context, statistics, half)

        def mean(statistic: str, name: str) -> torch.Tensor:
            assert statistics is not None  # `needs` says so
            owners = context.resolved_owners
            return statistics.mean(statistic, name, owners=owners, half=half)

        def reduced(weight: Weight) -> list[Pruned]:
            scores = ranked.scores(weight.name)
            chosen = [selection[weight.name] for selection in selections]
            if self.score_of_allocation is not None:
                chosen = _recut(ranked, scores, chosen, weight)
            return self.reduced(context, weight, scores, chosen, mean)

        with in_turn(weights.sharded or self.changes_weights):
            found = over_tensors(reduced, weights.values(), ranked.device)
        masks = []
        manifests = self.manifests(context, _calibration(statistics))
        for each, manifest in zip(zip(*found, strict=True), manifests, strict=True):
            masks.append(masks_of(dict(zip(weights, each, strict=True)), manifest))
        return masks

    def reduced(
        self,
        context: Context,
        weight: Weight,
        scores: torch.Tensor,
        selections: Sequence[Selection],
        mean: Callable[[str, str], torch.Tensor],
        rows: torch.Tensor | None = None,
    ) -> list[Pruned]:
        """What stays of one weight, for every selection.

        Args:
            context: of the run.
            weight: the dense one.
            scores: that rank its elements, float32 `[out, in]`.
            selections: each says how many elements go, and which by the scores.
            mean: takes the names of a statistic and of a weight; see `Statistics.mean`.
            rows: what `gradients` asks for, `[batches, out, in]`; None for none.
        """
        return [Pruned(pack(each.mask(scores).view(weight.shape))) for each in selections]

    def allocating(self) -> Composition:
        """The composition of what the allocation reads; it makes the same selections."""
        score = self.score_of_allocation or self.score
        return Composition(self.name, score, self.allocation, factors=self.factors)

    def selections(
        self, context: Context, statistics: Statistics | None
    ) -> list[dict[str, Selection]]:
        """For every target what chooses in each tensor; see `masks`."""
        return self._selected(context, statistics, None)[1]

    def _selected(
        self, context: Context, statistics: Statistics | None, half: int | None
    ) -> tuple[Scored, list[dict[str, Selection]]]:
        """Scores that rank within a tensor, and what chooses in each by them, for every target."""
        weights, published = context.weights, context.published
        weights.check_finite()
        evidence = self.evidence(context, statistics, half)
        ranked = Scored(self.score, weights, evidence, published)
        allocated = Scored(self.score_of_allocation or self.score, weights, evidence, published)
        if self.factors is not None:
            self.factors.check(weights)
            allocated = replace(allocated, scorer=Scaled(allocated.scorer, self.factors))
        if self.score_of_allocation is None:
            ranked = allocated
        with in_turn(weights.sharded):
            selections = self.allocation.select(allocated, context.targets, floor=context.floor)
        return ranked.ranking(), selections

    def manifests(self, context: Context, calibration: dict[str, Any] | None) -> list[Manifest]:
        """One for every target; `calibration` says what was read, None if nothing was."""
        tokens = context.tokens or self.tokens
        walk = self.walk_of(context)
        manifest = Manifest.for_weights(
            context.weights,
            method=self.name,
            parameters={
                **self.parameters,
                **self.allocation.record(),
                "floor": context.floor,
                "owners": context.resolved_owners,
                "variant": context.variant,
                **({} if walk == "model" else {"walk": walk}),
                **({} if tokens is None else tokens.record()),
            },
            seed=context.seed,
            calibration=calibration if self.needs else None,
        )
        asked = [dict(t) if isinstance(t, Mapping) else t for t in context.targets]
        return [replace(manifest, sparsity=sparsity) for sparsity in asked]

    def evidence(
        self, context: Context, statistics: Statistics | None, half: int | None = None
    ) -> dict[str, Evidence]:
        """What the scores read, by canonical name; see `masks`."""
        weights, seed, owners = context.weights, context.seed, context.resolved_owners
        if not self.needs:
            return {name: Evidence(name, seed) for name in weights}
        if statistics is None:
            raise StatisticsError(f"method {self.name!r} needs statistics; run the data pass first")
        statistics.check(weights, published=context.published, needs=self.needs)
        missing = [s.name for s in self.needs if s.name not in statistics.names()]
        if missing:
            raise StatisticsError(
                f"method {self.name!r} needs {', '.join(missing)}; the statistics hold "
                f"{', '.join(sorted(statistics.names()))}: repeat the data pass for this method"
            )

        def means(name: str) -> Mapping[str, torch.Tensor]:
            mean = partial(statistics.mean, weight=name, owners=owners, half=half)
            read = distinct(self.read)
            if any(isinstance(each, LossStatistic) for each in read):
                # As large as the weight, so of all weights together as large as the model.
                return OnDemand((each.name for each in read), mean)
            return {each.name: mean(each.name) for each in read}

        return {name: Evidence(name, seed, means(name)) for name in weights}

    def with_factors(self, factors: Mapping[str, float]) -> Composition:
        factors = Factors.of(factors)
        return replace(
            super().with_factors(factors),
            name=guided_name(self.name),
            parameters={**self.parameters, **factors.record()},
        )


def gather(needs: Iterable[Statistic], context: Context, *, keep_state: bool = False) -> Statistics:
    """One pass over the batches of the context, for the scores of one method or of several.

    Args:
        needs: what is gathered.
        context: of the run.
        keep_state: see `calibrate`.

    Raises:
        VlpError: see `calibrate`.
    """
    return calibrate(
        context.model,
        context.adapter,
        context.weights,
        context.batches,
        distinct(needs),
        published=context.published,
        autocast=context.autocast,
        skip_nonfinite=context.skip_nonfinite,
        keep_state=keep_state,
        halves=context.halves,
        limit=context.limit,
        checkpoint=context.checkpoint,
        checkpoint_every=context.checkpoint_every,
        resume=context.resume,
        progress=context.progress,
    )


def in_one_pass(method: Method) -> TypeGuard[Composition]:
    """Whether statistics of one pass over the dense model are all that a method reads."""
    if not isinstance(method, Composition):
        return False
    return not any(method.why_blocks(published=each) for each in (False, True))


def composed(method: Method) -> Composition:
    """The method, if its masks are made of statistics of one pass over the data.

    Raises:
        UnsupportedError: if it is a procedure, or walks block by block of its own.
    """
    if in_one_pass(method):
        return method
    raise UnsupportedError(
        f"method {method.name!r} runs the model as it goes: there are no statistics that one pass "
        "over the data could gather for it, or that two masks could be made from; prune with it "
        "directly"
    )


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


def _calibration(statistics: Statistics | None) -> dict[str, Any] | None:
    if statistics is None:
        return None
    read = statistics.fingerprint, statistics.batches, sum(statistics.samples)
    return calibration_record(*read, published=statistics.published)
