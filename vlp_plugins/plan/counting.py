"""Which counts of masks are known before any data is read."""

from __future__ import annotations

from collections.abc import Sequence

from vlp_plugins.job.prepared import Prepared
from vlp_plugins.masks.manifest import Count
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import packed_size
from vlp_plugins.methods.composition import Composition, make_masks
from vlp_plugins.methods.method import Method
from vlp_plugins.scoring.allocation import GlobalAllocation
from vlp_plugins.scoring.magnitude import Magnitude


def known_counts(method: Method, masks: Sequence[Masks]) -> list[dict[str, Count]]:
    """The counts that do not depend on data, from masks that were made without it.

    One threshold for all tensors removes int(sparsity x N) of N elements in all, but shares them
    out among modalities by scores. Any other allocation fixes what each modality loses.

    Args:
        method: what will be run.
        masks: with the counts that its allocation makes, whatever the scores.
    """
    found = []
    for each in masks:
        counts = each.counts()
        shared = {} if _shares_by_data(method) else counts.by_modality
        found.append({**shared, "all": counts.all})
    return found


def counting_masks(job: Prepared) -> list[Masks]:
    """Masks by magnitude in the allocation of a method: their counts are the method's."""
    return make_masks(
        job.weights,
        Composition("counts", Magnitude(), job.method.allocation),
        job.targets,
        floor=job.recipe.floor,
    )


def bytes_of_masks(job: Prepared) -> list[int]:
    """Bytes of the packed masks of every target."""
    return [sum(packed_size(w.numel) for w in job.weights.values()) for _ in job.targets]


def _shares_by_data(method: Method) -> bool:
    if not isinstance(method.allocation, GlobalAllocation):
        return False
    if isinstance(method, Composition):
        return bool((method.allocation_score or method.score).needs)
    return True
