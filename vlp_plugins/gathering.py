"""gather() and split_half(): the data pass by itself, and whether its data was enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.masks.compare import Overlap
from vlp_plugins.methods.composition import Composition, composed, make_masks
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.methods.method import Method
from vlp_plugins.methods.resolve import (
    resolve_adapter,
    resolve_method,
    resolve_profile,
    resolve_targets,
    with_pattern,
    with_profile,
)
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import Owners, Target, Variant, checked_arguments, is_published
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import autocast_of, neutral_state, takes_model
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.score import Scorer


@checked_arguments
@neutral_state()
@takes_model
def gather(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: str | Scorer | Method = "multiflow",
    adapter: Adapter | str | None = None,
    variant: Variant = "default",
    limit: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    autocast: torch.dtype | str | None = None,
    skip_nonfinite: bool = False,
    **parameters: Any,
) -> Statistics:
    """Runs the data pass of a method and makes no masks; `prune` takes the result for batches.

    Example:
        statistics = gather(model, interleave(photos, captions), limit=100)
        statistics.save("statistics.safetensors")
        masks = prune(model, sparsity=[0.63, 0.75, 0.9], statistics=statistics)

    Args:
        model: see `prune`. It is left as it is.
        batches: calibration batches; read once.
        method: what the statistics are for: registered name, a `Scorer` or a `Composition`;
            those of `id*NAME` are those of NAME.
        adapter: see `prune`.
        variant: what `prune` will be given; statistics of one do not serve the other.
        limit: number of batches to read; None reads all.
        checkpoint: file that keeps the state of the data pass.
        checkpoint_every: batches between two writes of it.
        resume: continue from that file.
        progress: called with (batches done, batches in all or None).
        autocast: see `prune`.
        skip_nonfinite: see `prune`.
        **parameters: of the method.

    Returns:
        The statistics; they serve every method that needs nothing else.

    Raises:
        UnsupportedError: if the method reads no data.
        DataError: if there are no batches.
        NonFiniteError: if a loss, gradient or activation is NaN or infinite.
    """
    adapter = resolve_adapter(model, adapter)
    resolved = resolve_method(method, None, [], parameters)
    composition = _reading(resolved.method if isinstance(resolved, IdGuided) else resolved)
    return calibrate(
        model,
        adapter,
        WeightMap.of(model, adapter),
        batches,
        composition.needs,
        published=is_published(variant),
        autocast=autocast_of(autocast),
        skip_nonfinite=skip_nonfinite,
        limit=limit,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        progress=progress,
    )


@checked_arguments
@neutral_state()
@takes_model
def split_half(
    model: nn.Module,
    statistics: Statistics,
    *,
    method: str | Scorer | Method = "multiflow",
    sparsity: Target | None = None,
    adapter: Adapter | str | None = None,
    allocation: Allocation | str | None = None,
    floor: float = 0.0,
    owners: Owners | None = None,
    seed: int = 0,
    id_profile: IdProfile | str | Path | None = None,
    **parameters: Any,
) -> dict[str, Overlap]:
    """Compares the masks that the even and the odd batches give alone: was that enough data?

    Example:
        statistics = gather(model, batches)
        for modality, overlap in split_half(model, statistics, sparsity=0.75).items():
            print(f"{modality}: {overlap.agreement:.1%} of the elements agree")

    Args:
        model: the one that the statistics are of.
        statistics: what `gather` returned; at least two batches. They know their variant.
        method: see `prune`.
        sparsity: see `prune`; one alone.
        adapter: see `prune`.
        allocation: see `prune`.
        floor: see `prune`.
        owners: see `prune`.
        seed: see `prune`.
        id_profile: see `prune`; nothing is measured here.
        **parameters: of the method.

    Returns:
        Overlaps by modality and, last, under `all`. The closer the agreement is to 1, the less
        more data would change.

    Raises:
        UnsupportedError: if the method reads no data, or for a list of sparsities.
        StatisticsError: if there was a single batch, or the statistics are of another model.
    """
    adapter = resolve_adapter(model, adapter)
    targets, single = resolve_targets(sparsity)
    if not single:
        raise UnsupportedError(f"sparsity={sparsity!r}: split_half compares one sparsity at a time")
    resolved = resolve_method(method, allocation, targets, parameters)
    targets = with_pattern(targets, resolved.allocation)
    profile = resolve_profile(id_profile)
    weights = WeightMap.of(model, adapter)
    published = statistics.published
    composition = _reading(with_profile(resolved, profile, weights, owners, published=published))
    even, odd = (
        make_masks(
            weights,
            composition,
            targets,
            statistics,
            floor=floor,
            owners=owners,
            published=published,
            seed=seed,
            half=half,
        )[0]
        for half in (0, 1)
    )
    return even.compare(odd)


def _reading(method: Method) -> Composition:
    """The method, if it reads data."""
    if isinstance(method, IdGuided):
        raise UnsupportedError(
            f"{method.name!r} needs the intrinsic dimensions of the model; measure them by "
            "measure_id and give id_profile"
        )
    method = composed(method)
    if not method.needs:
        raise UnsupportedError(
            f"method {method.name!r} reads no data, so there are no statistics to gather or to "
            "compare; prune with it directly, or name a method that reads data"
        )
    return method
