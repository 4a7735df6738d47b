"""Scores of the rows and columns of every weight, from a method's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.moments import ActivationStatistic, Statistic
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition, composed, in_one_pass
from vlp_plugins.methods.guided import IdGuided
from vlp_plugins.methods.method import Context, Method
from vlp_plugins.methods.resolve import with_profile
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import StatisticsError, StructureError, UnsupportedError
from vlp_plugins.scoring.score import Evidence, Scorer

Reduction = Literal["mean", "max", "sum"]


def normalised(values: Tensor, how: str | None) -> Tensor:
    """A vector, not negative, whose `mean`, `max` or `sum` is 1; None leaves it as it is.

    All zeros stay so.
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


@dataclass
class Place:
    """A layer, and what is left of it, in coordinates of the weight that was scored.

    Attributes:
        path: of the module.
        weight: canonical name of the weight that was scored.
        shape: `[out, in * height * width]` of that weight.
        spread: elements of a row per input: 1, of a convolution height * width.
        rows: int64, ascending; a layer split out of a fused one starts with its own.
        inputs: int64, ascending.
    """

    path: str
    weight: str
    shape: tuple[int, int]
    spread: int
    rows: Tensor
    inputs: Tensor

    @property
    def columns(self) -> Tensor:
        """The inputs that are left, element by element; int64, ascending."""
        if self.spread == 1:
            return self.inputs
        within = torch.arange(self.spread, device=self.inputs.device)
        return (self.inputs[:, None] * self.spread + within).flatten()

    @property
    def whole(self) -> bool:
        """True if nothing is gone."""
        return (len(self.rows), len(self.inputs) * self.spread) == self.shape

    def left_of(self, values: Tensor) -> Tensor:
        """`[rows, columns]` that are left of one value per element of the scored weight."""
        matrix = values.view(self.shape)
        return matrix if self.whole else matrix[self.rows][:, self.columns]

    def check(self, layer: nn.Module) -> Tensor:
        """The weight of a layer as `[rows, columns]`.

        Raises:
            StructureError: if it is not as large as what should be left of it.
        """
        weight = layer.weight
        assert isinstance(weight, Tensor)
        expected = (len(self.rows), len(self.inputs))
        if tuple(weight.shape[:2]) != expected:
            raise StructureError(
                f"{self.path} is {list(weight.shape[:2])}, but what was scored and then cut leaves "
                f"{list(expected)}: it was cut by other means than the pruner that asks this "
                "importance; call its refresh(), or make a new one"
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
            left = torch.arange(inputs // spread, device="cpu")
            found.append(Place(path, weight.name, (outputs, inputs), spread, rows, left))
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
                yield replace(place, path=path, rows=rows), modules[path]


Vectors = Callable[[Tensor, Place], tuple[Tensor, Tensor]]
"""Scores a weight again and again, while it gets smaller and is trained.

It takes what is left of the weight, detached `[rows, columns]`, and its `Place`; it returns the
importance of rows and columns, float32 `[rows]` and `[columns]`.
"""


@dataclass(frozen=True)
class ScoredVectors:
    """`Vectors` by a score, from the current weight and what was measured of the dense one.

    Attributes:
        evidence: of the dense weight; statistics are cut as the weight is.
        neurons: False averages the scores of elements where a score has its own way of scoring
            rows and columns.
    """

    scorer: Scorer
    evidence: Evidence
    needs: tuple[Statistic, ...]
    neurons: bool = True

    def __call__(self, weight: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        evidence = self.evidence if place.whole else self._cut(place)
        if self.neurons:
            return self.scorer.neurons(weight, evidence)
        return Scorer.neurons(self.scorer, weight, evidence)

    def _cut(self, place: Place) -> Evidence:
        found = {
            each.name: _cut(each, self.evidence.statistics[each.name], place) for each in self.needs
        }
        first = int(place.rows[0])
        # Parts of one fused weight are not drawn alike by a score that draws by name.
        name = f"{self.evidence.name}[{first}]" if first else self.evidence.name
        return replace(self.evidence, name=name, statistics=found)


def _cut(statistic: Statistic, values: Tensor, place: Place) -> Tensor:
    """What is left of a statistic of the dense weight."""
    outputs, inputs = place.shape
    if isinstance(statistic, ActivationStatistic):
        if values.numel() == inputs:
            return values[place.columns]
        if values.numel() == inputs * inputs:
            square = values.view(inputs, inputs)
            return square[place.columns][:, place.columns].flatten()
    elif values.numel() == outputs * inputs:
        return place.left_of(values).flatten()
    raise UnsupportedError(
        f"statistic {statistic.name!r} has {values.numel()} values for a weight of {outputs} x "
        f"{inputs}, so it cannot follow rows and columns that are cut; prune in one step, or call "
        "refresh() of the importance after each"
    )


def _fixed(scores: Tensor) -> Vectors:
    """Vectors of a procedure's scores of elements, which do not follow the weight's values."""

    def vectors(_: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        left = place.left_of(scores)
        return left.mean(1), left.mean(0)

    return vectors


LADDER = (0.25, 0.5, 0.75)
"""Sparsities at which a procedure is asked for masks: what is kept at more of them matters more."""


def vectors_of(
    method: Method, context: Context, *, neurons: bool, profile: IdProfile | None
) -> tuple[dict[str, Vectors], Mapping[str, float]]:
    """What scores each weight, by canonical name, and a factor of each.

    A composition is asked for its score, whose statistics one pass over the batches gathers. A
    procedure, or a method that writes new values, has no score of elements but its masks: it
    makes masks at several sparsities, the targets of the context, and an element's score is its
    size |w|, with new values if there are some, summed over the masks that keep it. What goes first
    scores 0. Without a profile `id*NAME` measures one from the batches.

    Raises:
        VlpError: see `prune`.
    """
    weights, published = context.weights, context.published
    if isinstance(method, IdGuided) and isinstance(method.method, Composition):
        if profile is None and not context.has_batches:
            raise StatisticsError(
                f"importance by {method.name!r} needs data: give batches, or an id_profile"
            )
        profile = profile or method.measured(context)
        method = with_profile(method, profile, weights, None, published=published)
    if not in_one_pass(method) or method.changes_weights:
        masks = prune(
            context.model,
            context.batches,
            method=method,
            sparsity=list(context.targets),
            adapter=context.adapter,
            variant="published" if published else "default",
            seed=context.seed,
            limit=context.limit,
            id_profile=profile if isinstance(method, IdGuided) else None,
        )
        return {name: _fixed(_summed(name, weights, masks)) for name in weights}, {}
    composition = composed(method)
    weights.check_finite()
    composition.check(context)
    if context.statistics is not None:
        context.statistics.check(weights, published=published)
    evidence = composition.evidence(context, composition.gather(context))
    score, needs = composition.score, composition.needs
    found: dict[str, Vectors] = {
        name: ScoredVectors(score, each, needs, neurons) for name, each in evidence.items()
    }
    factors = composition.factors
    return found, {} if factors is None else {name: factors.relative(name) for name in weights}


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
