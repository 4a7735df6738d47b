"""From scores to the mask of one tensor: scores computed on demand, and what chooses among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import NonFiniteError
from vlp_plugins.runtime.parallel import on_host
from vlp_plugins.runtime.sharding import OnDemand
from vlp_plugins.scoring.factors import Scaled, before_scaling
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.score import Evidence, MagnitudeRanked, Scorer, scores_of
from vlp_plugins.scoring.threshold import Cut, Sampled, ScoreSource, find_cuts


class Selection(Protocol):
    """Chooses the elements of one tensor that stay."""

    @property
    def remove(self) -> int:
        """How many elements go."""

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """True where an element stays; bool, shape of `scores`."""


@dataclass(frozen=True)
class Scored:
    """Weights with the scorer to apply to them; scores are computed whenever they are asked for."""

    scorer: Scorer
    weights: Mapping[str, Weight]
    evidence: Mapping[str, Evidence]
    published: bool = False

    def scores(self, name: str) -> torch.Tensor:
        """`[out, in]` float32 scores of one weight.

        Raises:
            NonFiniteError: if the score has NaN or infinity.
        """
        scores = self._unchecked(name)
        self._check({name: scores.sum()})
        return scores

    def _unchecked(self, name: str) -> torch.Tensor:
        return scores_of(self.scorer, self.weights[name].matrix, self.evidence[name])

    def _check(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Raises `NonFiniteError` for the first scores with NaN or infinity; one wait for all."""
        # The sum shows every NaN and infinity, at a fraction of the cost; an overflow shows too.
        finite = torch.isfinite(on_host(list(sums.values()))).tolist()
        for name in (name for name, is_finite in zip(sums, finite, strict=True) if not is_finite):
            if not bool(torch.isfinite(self._unchecked(name)).all()):
                raise NonFiniteError(
                    f"scorer {self.scorer.name!r} gives NaN or infinite scores for weight "
                    f"{name!r}; check its weights and statistics for such values"
                )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.weights.values())).device

    def source(self, name: str) -> ScoreSource:
        """`scores` of one weight as a function."""
        return partial(self.scores, name)

    def _sampled(self, name: str) -> Sampled:
        weight = self.weights[name]

        def every(n: int) -> torch.Tensor:
            evidence = self.evidence[name].every(n)
            return scores_of(self.scorer, weight.matrix.flatten()[None, ::n], evidence)

        return Sampled(weight.numel, every)

    def subset(self, names: Sequence[str]) -> Scored:
        """The same for some of the weights."""
        return replace(self, weights={name: self.weights[name] for name in names})

    def ranking(self) -> Scored:
        """The same with the cheapest scorer of the same order within a tensor."""
        if self.published:
            return self
        scorer = self.unscaled
        return replace(self, scorer=Magnitude() if isinstance(scorer, MagnitudeRanked) else scorer)

    @property
    def unscaled(self) -> Scorer:
        """The scorer without factors."""
        return self.scorer.scorer if isinstance(self.scorer, Scaled) else self.scorer

    def cuts(self, removals: Sequence[int]) -> list[dict[str, Cut]]:
        """Cuts of the `ranking()` scores that remove exactly so many elements in all."""
        if self.published:
            return self._own_cuts(removals)
        if isinstance(self.unscaled, MagnitudeRanked):
            matrices = OnDemand(self.weights, lambda name: self.weights[name].matrix)
            if not isinstance(self.scorer, Scaled):
                return self.unscaled.global_cuts(matrices, removals)
            scales = {name: self.scorer.factors.relative(name) for name in self.weights}
            return self.unscaled.global_cuts(matrices, removals, scales)
        if not isinstance(self.scorer, Scaled):
            return self._own_cuts(removals)
        factors, ranked = self.scorer.factors, self.ranking()
        return [
            {
                name: cut or ranked.cuts_of(ranked.scores(name), [cuts[name].remove])[0]
                for name, cut in before_scaling(cuts, factors).items()
            }
            for cuts in self._own_cuts(removals)
        ]

    def _own_cuts(self, removals: Sequence[int]) -> list[dict[str, Cut]]:
        """Cuts of the scores themselves."""
        sources = {name: self.source(name) for name in self.weights}
        samples = {name: self._sampled(name) for name in self.weights}
        sums: dict[str, torch.Tensor] = {}
        if self.device.type != "cpu":  # a check of each would wait for each
            sources = {name: partial(self._summed, name, sums) for name in self.weights}
        found = find_cuts(
            sources,
            removals,
            all_ties=self.published,
            device=self.device,
            samples=samples if self.scorer.elementwise else None,
        )
        if sums:
            self._check(sums)
        return found

    def _summed(self, name: str, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scores of one weight, whose sum is kept to be checked with the others."""
        scores = self._unchecked(name)
        sums[name] = scores.sum()
        return scores

    def cuts_of(self, scores: torch.Tensor, removals: Sequence[int]) -> list[Cut]:
        """Cuts of one tensor's scores that remove so many of its smallest, one per count."""
        sampled = Sampled(scores.numel(), lambda n: scores.flatten()[::n])
        found = find_cuts(
            {"": lambda: scores}, removals, all_ties=self.published, samples={"": sampled}
        )
        return [cuts[""] for cuts in found]


@dataclass(frozen=True)
class RowSelection:
    """Removes the same number of the smallest elements of each row (output neuron).

    Attributes:
        per_row: how many of each.
        rows: number of rows.
        extra: rows, fewer than all, that lose one more: those whose next element is the smallest.
    """

    per_row: int
    rows: int
    extra: int = 0

    @property
    def remove(self) -> int:
        """How many elements go."""
        return self.per_row * self.rows + self.extra

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """True where an element stays; equal scores go by position."""
        mask = keep_largest_of_rows(scores, scores.shape[1] - self.per_row)
        if self.extra:
            kept = scores.masked_fill(~mask, torch.inf)
            places = kept.argmin(1)  # of equal ones the first
            chosen = kept.gather(1, places[:, None])[:, 0].sort(stable=True).indices[: self.extra]
            mask[chosen, places[chosen]] = False
        return mask


@dataclass(frozen=True)
class PatternSelection:
    """Keeps the `keep` largest of every `of` consecutive inputs."""

    keep: int
    of: int
    numel: int

    @property
    def remove(self) -> int:
        """How many elements go."""
        return self.numel // self.of * (self.of - self.keep)

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """True where an element stays; equal scores go by position."""
        return keep_largest_of_rows(scores.reshape(-1, self.of), self.keep).view(scores.shape)


def keep_largest_of_rows(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """True at the `keep` largest of every row; among equals the first go first.

    Args:
        scores: `[rows, columns]`.
        keep: 0 to columns.
    """
    columns = scores.shape[1]
    if keep in (0, columns):
        return torch.full_like(scores, keep == columns, dtype=torch.bool)
    threshold = scores.kthvalue(columns - keep, dim=1, keepdim=True).values
    mask = scores > threshold
    missing = keep - mask.sum(1)
    rows = torch.nonzero(missing)[:, 0]
    ties = scores[rows] == threshold[rows]
    from_end = ties.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    mask[rows] |= ties & (from_end <= missing[rows, None])
    return mask
