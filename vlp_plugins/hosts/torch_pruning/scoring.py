"""From a method's name to what scores rows and columns of every weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.hosts.torch_pruning.vectors import Fixed, Scored, Vectors
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.methods.method import Method, Procedure
from vlp_plugins.methods.resolve import resolve_method, resolve_profile, with_profile
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import Variant, is_published, resolve_owners
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import measure_id, prune
from vlp_plugins.runtime.errors import StatisticsError
from vlp_plugins.scoring.score import Evidence, Scorer

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
        found[name] = Scored(resolved.score, Evidence(name, seed, known), needs, neurons)
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
