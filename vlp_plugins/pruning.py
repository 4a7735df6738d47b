"""prune(): the one place where the parts meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from vlp_plugins.adapter import Adapter, Batch
from vlp_plugins.allocation import Allocation
from vlp_plugins.calibration import calibrate
from vlp_plugins.cuts import Cut
from vlp_plugins.errors import StatisticsError
from vlp_plugins.masks import Manifest, Masks, pack
from vlp_plugins.methods.base import Composition
from vlp_plugins.parallel import over_tensors
from vlp_plugins.resolving import (
    Owners,
    Variant,
    is_published,
    resolve_adapter,
    resolve_method,
    resolve_owners,
    resolve_targets,
    with_pattern,
)
from vlp_plugins.scorers.base import Evidence, Scorer
from vlp_plugins.selection import Scored, Selection
from vlp_plugins.statistics.store import Statistics
from vlp_plugins.targets import Target
from vlp_plugins.weights import Weight, WeightMap


@overload
def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    sparsity: Target | None = None,
    method: str | Scorer | Composition = ...,
    **options: Any,
) -> Masks: ...


@overload
def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    sparsity: Sequence[Target],
    method: str | Scorer | Composition = ...,
    **options: Any,
) -> list[Masks]: ...


def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    sparsity: Target | Sequence[Target] | None = None,
    method: str | Scorer | Composition = "multiflow",
    adapter: Adapter | str | None = None,
    allocation: Allocation | str | None = None,
    floor: float = 0.0,
    owners: Owners | None = None,
    variant: Variant = "default",
    statistics: Statistics | str | Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    **parameters: Any,
) -> Masks | list[Masks]:
    """Finds which weights of a model to remove. The model itself is left as it is.

    Args:
        model: any module that an adapter claims; see `ModuleAdapter` for others.
        batches: calibration batches, for methods that need data; read once.
        sparsity: fraction removed in [0, 1), by modality if a mapping; several make several masks
            from one pass over the data. Left out with a `Pattern`, which fixes it.
        method: registered name, a `Scorer` (with global allocation) or a `Composition`.
        adapter: name (`module` for any module) or instance; None asks every adapter.
        allocation: how the target is shared out among tensors; None: the method's published way.
        floor: least fraction that every tensor keeps.
        owners: whether the statistics of a tied weight come from `all` modules that use it or
            from the `first`; None: all, or first in the published variant. All was chosen by
            measurement: `python -m benchmarks.demo.owners`.
        variant: `published` reproduces the counts and quirks of the published code.
        statistics: of an earlier pass (or their file), used instead of `batches`.
        seed: for scores that draw random numbers.
        limit: number of batches to read; None reads all.
        checkpoint: file that keeps the state of the data pass.
        checkpoint_every: batches between two writes of it.
        resume: continue from that file.
        progress: called with (batches done, batches in all or None).
        **parameters: of the method, such as `edges=False` for MULTIFLOW.

    Returns:
        Masks; a list of them if `sparsity` is a sequence.
    """
    adapter = resolve_adapter(model, adapter)
    targets, single = resolve_targets(sparsity)
    composition = resolve_method(method, allocation, targets, parameters)
    targets = with_pattern(targets, composition.allocation)
    published = is_published(variant)
    weights = WeightMap.of(model, adapter)
    if isinstance(statistics, (str, Path)):
        statistics = Statistics.load(statistics)
    if composition.needs and statistics is None:
        if batches is None:
            raise StatisticsError(
                f"method {composition.name!r} needs data: give batches, or statistics of an "
                "earlier pass"
            )
        statistics = calibrate(
            model,
            adapter,
            weights,
            batches,
            composition.needs,
            published=published,
            limit=limit,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
            progress=progress,
        )
    masks = make_masks(
        weights,
        composition,
        targets,
        statistics,
        floor=floor,
        owners=owners,
        published=published,
        seed=seed,
    )
    return masks[0] if single else masks


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
    allocated = ranked
    if method.allocation_score is not None:
        allocated = Scored(method.allocation_score, weights, evidence, published)
    selections = method.allocation.select(allocated, targets, floor=floor)
    ranked = ranked.ranking()

    def bits_of(weight: Weight) -> list[torch.Tensor]:
        scores = ranked.scores(weight.name)
        chosen = [selection[weight.name] for selection in selections]
        if method.allocation_score is not None:
            chosen = _recut(ranked, scores, chosen, weight)
        return [pack(selection.mask(scores).view(weight.shape)) for selection in chosen]

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
    """Quirk M6: the published code passes the count through a floating-point fraction."""
    return int((1 - (numel - removed) / numel) * numel)


def _parameters(
    method: Composition, *, floor: float, owners: Owners, published: bool
) -> dict[str, Any]:
    return {
        **method.parameters,
        "allocation": method.allocation.name,
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
