"""measure_id(): the intrinsic dimension of what every prunable layer gives out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from vlp_plugins.dimension.measure import default_settings, measure
from vlp_plugins.dimension.outputs import Padding
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.dimension.twonn import Estimator
from vlp_plugins.methods.resolve import resolve_adapter
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import Variant, checked_arguments, is_published
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.memory import bytes_of
from vlp_plugins.runtime.model_state import dtype_of, neutral_state, takes_model


@checked_arguments
@neutral_state()
@takes_model
def measure_id(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    adapter: Adapter | str | None = None,
    estimator: Estimator | None = None,
    padding: Padding | None = None,
    dtype: torch.dtype | str | None = None,
    memory_budget: int | str | None = None,
    variant: Variant = "default",
    limit: int | None = None,
    workplace: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> IdProfile:
    """Measures the intrinsic dimension of every layer that can be pruned, in every stream.

    Example:
        profile = measure_id(model, batches, memory_budget="8GiB")
        profile.save("dimensions.json")
        masks = prune(model, batches, method="id*multiflow", sparsity=0.75, id_profile=profile)

    Args:
        model: see `prune`. It is left as it is.
        batches: a list or a loader without shuffling, which is read once per pass; some hundred
            samples or more.
        adapter: see `prune`.
        estimator: how a dimension is made of points; None: TwoNN on all points, in the published
            variant the mean over 1 to 20 blocks.
        padding: `real`: a point holds a sample's real tokens, then zeros, so that it is the same in
            every batch; `published`: also what layers give out for padding. None: `real`, or
            `published` in the published variant.
        dtype: that points are kept in; None: that of the outputs. `bfloat16` halves the memory and
            loses digits.
        memory_budget: what points and the search for neighbours may take beside the model, such as
            `"8GiB"`; None: three quarters of what is free. It decides how many passes over the
            batches there are, and changes no result.
        variant: `published` follows the published code in all of this.
        limit: number of batches to read; None reads all.
        workplace: folder that keeps what is known after every pass.
        resume: go on from there.
        progress: called with (batches done, batches of all passes or None).

    Raises:
        VlpError: see `vlp_plugins.intrinsic.measuring.measure`.
    """
    published = is_published(variant)
    adapter = resolve_adapter(model, adapter)
    usual = default_settings(published=published)
    return measure(
        model,
        adapter,
        WeightMap.of(model, adapter),
        batches,
        estimator=estimator or usual[0],
        padding=padding or usual[1],
        dtype=dtype_of(dtype),
        memory_budget=None if memory_budget is None else bytes_of(memory_budget),
        published=published,
        limit=limit,
        workplace=None if workplace is None else Path(workplace),
        resume=resume,
        progress=progress,
    )
