"""Scores of the rows and columns of every weight, from a method's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.statistic import ActivationStatistic, Statistic
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.methods.method import Method, Procedure
from vlp_plugins.methods.resolve import resolve_method, resolve_profile, with_profile
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import Variant, is_published, resolve_owners
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import measure_id, prune
from vlp_plugins.runtime.errors import StatisticsError, StructureError, UnsupportedError
from vlp_plugins.scoring.score import Evidence, Scorer

Reduction = Literal["mean", "max", "sum"]


@dataclass(frozen=True)
class Section:
    """What is left of a weight, in coordinates of the weight that was scored.

    Attributes:
        rows: int64, ascending.
        columns: int64, ascending; of a convolution elements of `[in * height * width]`.
        shape: `[out, in]` of the weight that was scored.
    """

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @property
    def whole(self) -> bool:
        """True if nothing is gone."""
        return (len(self.rows), len(self.columns)) == self.shape

    def of_matrix(self, values: Tensor) -> Tensor:
        """What is left of one value per element, flat as it was given."""
        matrix = values.view(self.shape)
        return matrix[self.rows][:, self.columns].flatten()


class Vectors(ABC):
    """Scores one weight again and again, while it gets smaller and is trained."""

    @abstractmethod
    def __call__(self, weight: Tensor, section: Section) -> tuple[Tensor, Tensor]:
        """Importance of rows and columns.

        Args:
            weight: detached `[rows, columns]`, what is left of the weight, as it is now.
            section: which rows and columns these are.

        Returns:
            float32 `[rows]` and `[columns]`.
        """


@dataclass(frozen=True)
class ScoredVectors(Vectors):
    """By a score, from the current weight and what was measured of the dense one.

    Attributes:
        scorer: whose `neurons` are asked.
        evidence: of the dense weight; statistics are cut as the weight is.
        needs: the statistics in it.
        neurons: False averages the scores of elements where a score has its own way of scoring
            rows and columns.
    """

    scorer: Scorer
    evidence: Evidence
    needs: tuple[Statistic, ...]
    neurons: bool = True

    def __call__(self, weight: Tensor, section: Section) -> tuple[Tensor, Tensor]:
        evidence = self.evidence if section.whole else self._cut(section)
        if self.neurons:
            return self.scorer.neurons(weight, evidence)
        return Scorer.neurons(self.scorer, weight, evidence)

    def _cut(self, section: Section) -> Evidence:
        found = {
            each.name: _cut(each, self.evidence.statistics[each.name], section)
            for each in self.needs
        }
        first = int(section.rows[0])
        # Parts of one fused weight are not drawn alike by a score that draws by name.
        name = f"{self.evidence.name}[{first}]" if first else self.evidence.name
        return replace(self.evidence, name=name, statistics=found)


@dataclass(frozen=True)
class Fixed(Vectors):
    """By scores of elements that a procedure left, whatever became of the weight since.

    Attributes:
        scores: float32 `[out, in]`.
    """

    scores: Tensor

    def __call__(self, weight: Tensor, section: Section) -> tuple[Tensor, Tensor]:
        scores = self.scores if section.whole else self.scores[section.rows][:, section.columns]
        return scores.mean(1), scores.mean(0)


def _cut(statistic: Statistic, values: Tensor, section: Section) -> Tensor:
    """What is left of a statistic of a weight of which this is left.

    Raises:
        UnsupportedError: if its values belong to neither inputs nor elements.
    """
    outputs, inputs = section.shape
    if isinstance(statistic, ActivationStatistic):
        if values.numel() == inputs:
            return values[section.columns]
        if values.numel() == inputs * inputs:
            square = values.view(inputs, inputs)
            return square[section.columns][:, section.columns].flatten()
    elif values.numel() == outputs * inputs:
        return section.of_matrix(values)
    raise UnsupportedError(
        f"statistic {statistic.name!r} has {values.numel()} values for a weight of {outputs} x "
        f"{inputs}, so it cannot follow rows and columns that are cut; prune in one step, or call "
        "refresh() of the importance after each"
    )


def normalised(values: Tensor, how: str | None) -> Tensor:
    """A vector on a scale that layers share; all zeros stay so.

    Args:
        values: not negative.
        how: `mean` or `max` becomes 1, `sum` likewise, None leaves it as it is.
    """
    if how is None:
        return values
    scale = values.max() if how == "max" else values.sum()
    if how == "mean":
        scale = scale / len(values)
    return values / scale if bool(scale > 0) else values


def reduced(vectors: Sequence[Tensor], how: Reduction) -> Tensor:
    """One vector of several of one length: their `mean`, `max` or `sum`."""
    stacked = torch.stack(list(vectors))
    if how == "max":
        return stacked.amax(0)
    return stacked.mean(0) if how == "mean" else stacked.sum(0)


def check_words(normalize: str | None, reduction: str) -> None:
    """Raises `UnsupportedError` for words that `normalised` or `reduced` do not know."""
    if normalize not in ("mean", "max", "sum", None):
        raise UnsupportedError(f"normalize={normalize!r} is none of mean, max, sum, None")
    if reduction not in ("mean", "max", "sum"):
        raise UnsupportedError(f"reduction={reduction!r} is none of mean, max, sum")


@dataclass
class Place:
    """A layer, and what is left of it.

    Attributes:
        path: of the module.
        weight: canonical name of the weight that was scored.
        shape: `[out, in * height * width]` of that weight.
        spread: elements of a row per input: 1, of a convolution height * width.
        rows: int64, the rows of the weight that are left; a layer split out of a fused one starts
            with its own.
        columns: int64, the inputs that are left.
    """

    path: str
    weight: str
    shape: tuple[int, int]
    spread: int
    rows: Tensor
    columns: Tensor

    def section(self) -> Section:
        """What is left, element by element."""
        columns = self.columns
        if self.spread > 1:
            within = torch.arange(self.spread, device=columns.device)
            columns = (columns[:, None] * self.spread + within).flatten()
        return Section(self.rows, columns, self.shape)

    def check(self, layer: nn.Module) -> Tensor:
        """The weight of a layer as `[rows, columns]`.

        Raises:
            StructureError: if it is not as large as what should be left of it.
        """
        weight = layer.weight
        assert isinstance(weight, Tensor)
        expected = (len(self.rows), len(self.columns))
        if tuple(weight.shape[:2]) != expected:
            raise StructureError(
                f"{self.path} is {list(weight.shape[:2])}, but what was scored and then cut leaves "
                f"{list(expected)}: it was cut by other means than the pruner that asks this "
                "importance; call its refresh(), or make it anew"
            )
        return weight.detach().flatten(1)


def places_of(weights: WeightMap) -> list[Place]:
    """Every layer that has a prunable weight, once for each module path."""
    found = []
    for weight in weights.values():
        spread = weight.parameter[0, 0].numel()
        outputs, inputs = weight.rows_and_columns
        for path in dict.fromkeys(owner.module for owner in weight.owners):
            rows = torch.arange(outputs, device="cpu")
            columns = torch.arange(inputs // spread, device="cpu")
            found.append(Place(path, weight.name, (outputs, inputs), spread, rows, columns))
    return found


def at_modules(model: nn.Module, places: Sequence[Place]) -> dict[nn.Module, list[Place]]:
    """The places at every module that is there now: several where one module has several paths.

    A fused layer that was split since is found in the three that took its place.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, list[Place]] = {}
    for place in places:
        if (module := modules.get(place.path)) is not None:
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                found.setdefault(module, []).append(place)
            continue
        for part, layer in _split(place, modules):
            found.setdefault(layer, []).append(part)
    return found


_SPLIT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


def _split(place: Place, modules: dict[str, nn.Module]) -> Iterator[tuple[Place, nn.Module]]:
    """The three parts of a fused layer that is no longer there."""
    parent = place.path.rpartition(".")[0]
    for names in _SPLIT:
        paths = [f"{parent}.{name}" if parent else name for name in names]
        if all(isinstance(modules.get(path), nn.Linear) for path in paths):
            for path, rows in zip(paths, place.rows.chunk(3), strict=True):
                part = Place(path, place.weight, place.shape, 1, rows, place.columns.clone())
                yield part, modules[path]


LADDER = (0.25, 0.5, 0.75)
"""Sparsities at which a procedure is asked for masks: what is kept at more of them matters more."""


def vectors_of(
    method: str | Scorer | Method,
    model: nn.Module,
    adapter: Adapter,
    weights: WeightMap,
    batches: Iterable[Batch] | None,
    *,
    parameters: Mapping[str, Any],
    neurons: bool,
    sparsities: Sequence[float],
    variant: Variant,
    seed: int,
    statistics: Statistics | None,
    id_profile: IdProfile | str | None,
    limit: int | None,
) -> tuple[dict[str, Vectors], Mapping[str, float]]:
    """What scores each weight, by canonical name, and a factor of each.

    A composition is asked for its score, whose statistics one pass over the batches gathers. A
    procedure has no score of elements beside its masks: it makes masks at several sparsities, and
    an element's score is its size, |w| with new values if the method writes some, summed over the
    masks that keep it. What goes first scores 0.

    Args:
        method: see `prune`.
        model: see `prune`; as before afterwards.
        adapter: of the model.
        weights: of the model.
        batches: for methods that need data.
        parameters: of the method.
        neurons: see `Scored`.
        sparsities: at which a procedure makes masks.
        variant: see `prune`.
        seed: see `prune`.
        statistics: of an earlier pass, instead of batches.
        id_profile: for `id*NAME`; measured from the batches if None.
        limit: see `prune`.

    Raises:
        VlpError: see `prune`.
    """
    resolved = resolve_method(method, None, list(sparsities), parameters)
    if isinstance(resolved, IdGuided) and isinstance(resolved.method, Composition):
        profile = resolve_profile(id_profile)
        if profile is None:
            profile = measure_id(
                model, _needed(resolved, batches), adapter=adapter, variant=variant, limit=limit
            )
        resolved = with_profile(resolved, profile, weights, None, published=is_published(variant))
    if isinstance(resolved, Procedure):
        masks = prune(
            model, batches, method=resolved, sparsity=list(sparsities), adapter=adapter,
            variant=variant, seed=seed, limit=limit, id_profile=id_profile,
        )  # fmt: skip
        return {name: Fixed(_summed(name, weights, masks)) for name in weights}, {}
    weights.check_finite()
    assert isinstance(resolved, Composition)
    needs = resolved.score.needs
    if needs and statistics is None:
        statistics = calibrate(
            model,
            adapter,
            weights,
            _needed(resolved, batches),
            needs,
            published=is_published(variant),
            limit=limit,
        )
    owners = resolve_owners(None, published=is_published(variant))
    if statistics is not None:
        statistics.check(weights, published=is_published(variant))
    found: dict[str, Vectors] = {}
    for name in weights:
        known = {}
        if needs and statistics is not None:
            known = {n.name: statistics.mean(n.name, name, owners=owners) for n in needs}
        found[name] = ScoredVectors(resolved.score, Evidence(name, seed, known), needs, neurons)
    factors = resolved.factors
    return found, {} if factors is None else {name: factors.relative(name) for name in weights}


def _needed(method: Method, batches: Iterable[Batch] | None) -> Iterable[Batch]:
    if batches is None:
        raise StatisticsError(
            f"importance by {method.name!r} needs data: give batches, or statistics of an earlier "
            "pass"
        )
    return batches


@torch.no_grad()
def _summed(name: str, weights: WeightMap, masks: Sequence[Masks]) -> Tensor:
    dense = weights[name].matrix
    scores = torch.zeros_like(dense, dtype=torch.float32)
    for each in masks:
        keep = each[name].to(dense.device).view(dense.shape)
        values = dense.float()
        if each.new_values is not None:
            new = each.new_values[name].to(dense.device)
            values = torch.zeros_like(values).masked_scatter_(keep, new)
        scores += values.abs().mul_(keep)
    return scores / len(masks)
