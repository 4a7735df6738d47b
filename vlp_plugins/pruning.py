"""prune(), gather(), split_half() and measure_id(): where the parts meet."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from vlp_plugins.calibration.outputs import Padding
from vlp_plugins.calibration.selections import TokenSelection, selection_of
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.dimension.measure import measure
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.dimension.twonn import Estimator
from vlp_plugins.masks.compare import Overlap
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition, composed
from vlp_plugins.methods.guided import IdGuided
from vlp_plugins.methods.method import Context, Method, Walk
from vlp_plugins.methods.reconstruction.layer import Solver
from vlp_plugins.methods.resolve import (
    resolve_adapter,
    resolve_method,
    resolve_targets,
    with_pattern,
    with_profile,
)
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.inspection import warn_of_dense
from vlp_plugins.models.request import Owners, Target, Variant, checked_arguments, is_published
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnsupportedError, no_exit
from vlp_plugins.runtime.memory import bytes_of
from vlp_plugins.runtime.model_state import (
    autocast_of,
    buffers_kept,
    dtype_of,
    neutral_state,
    takes_model,
)
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.score import Scorer

_log = logging.getLogger(__name__)


@overload
def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    sparsity: Target | None = None,
    method: str | Scorer | Solver | Method = ...,
    **options: Any,
) -> Masks: ...


@overload
def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    sparsity: Sequence[Target],
    method: str | Scorer | Solver | Method = ...,
    **options: Any,
) -> list[Masks]: ...


@checked_arguments
@neutral_state()
@takes_model
def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    sparsity: Target | Sequence[Target] | None = None,
    method: str | Scorer | Solver | Method = "multiflow",
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
    autocast: torch.dtype | str | None = None,
    skip_nonfinite: bool = False,
    walk: Walk | None = None,
    tokens: TokenSelection | str | None = None,
    memory_budget: int | str | None = None,
    workplace: Path | None = None,
    id_profile: IdProfile | str | Path | None = None,
    **parameters: Any,
) -> Masks | list[Masks]:
    """Finds which weights of a model to remove. The model itself is left as it is.

    Example:
        masks = vlp.prune(model, data, method="multiflow", sparsity=0.75)
        masks.apply(model)

    Args:
        model: any module that an adapter claims; see `ModuleAdapter` for others.
            Under `torchrun` it may be sharded by `fully_shard`: call `prune` in every process with
            the same batches; leave whole (`ignored_params`) scalars and what its losses change.
        batches: calibration batches, for methods that need data; read once by a `Composition`, and
            perhaps several times by a `Procedure`, which needs a list or a loader then.
        sparsity: fraction removed in [0, 1), by modality if a mapping; several make several masks
            from one pass over the data. Left out with a `Pattern`, which fixes it.
        method: registered name, a `Scorer` (with global allocation), `Solver`, `Composition` or
            `Procedure`. `id*NAME` is NAME with the importance of every layer multiplied by the
            intrinsic dimension of its outputs.
        adapter: name (`module` for any module) or instance; None asks every adapter.
        allocation: how many elements each tensor keeps; None: the method's published way; `id`:
            budgets per modality in proportion to its intrinsic dimension.
        floor: least fraction that every tensor keeps.
        owners: whether the statistics of a tied weight come from `all` modules that use it or
            from the `first`; None: all, or first in the published variant. All was chosen by
            measurement: `python -m benchmarks.demo.owners`.
        variant: `published` reproduces the counts and quirks of the published code.
        statistics: of an earlier pass (or their file), used instead of `batches`.
        seed: for scores that draw random numbers.
        limit: number of batches to read; None reads all.
        checkpoint: file that keeps the state of a composition's data pass.
        checkpoint_every: batches between two writes of it.
        resume: continue from that file, or from the stages in `workplace`.
        progress: called with (batches done, batches in all or None).
        autocast: `bfloat16` or `float16` for forward passes of methods that need gradients.
        skip_nonfinite: leave out batches whose loss or gradients are not finite.
        walk: `blocks` prunes block by block: each is measured on what the pruned ones before it
            give out, which takes a walk for every sparsity; `model` runs the dense model once.
            None: the method's own.
        tokens: which of the real tokens count, in a walk by blocks: the name of a token selection,
            such as `text` or `atv(alpha=1.5)`, or one itself.
        memory_budget: what gradients of many batches, or the points that dimensions are measured
            from, may take in addition to the model, bytes or `"8GiB"`; None: three quarters of what
            is free. In a walk by blocks it is RAM of each process: for gradients by blocks, for the
            solver of a layer that reads them if the model is on the CPU (on a GPU that takes the
            GPU's memory, which is not bounded), and what is left for batches that wait.
        workplace: folder for gradients on disk and for checkpoints between the stages of iterative
            methods; None: a temporary one.
        id_profile: the intrinsic dimensions of the model, or their file, for `id*NAME` and the
            allocation `id`; None measures them first, from the same batches. `measure_id` returns
            one that can be saved and used again.
        **parameters: of the method, such as `edges=False` for MULTIFLOW.

    Returns:
        Masks; a list of them if `sparsity` is a sequence.
    """
    adapter = resolve_adapter(model, adapter)
    targets, single = resolve_targets(sparsity)
    resolved = resolve_method(method, allocation, targets, parameters, walk, tokens)
    targets = with_pattern(targets, resolved.allocation)
    published = is_published(variant)
    weights = WeightMap.of(model, adapter)
    weights.check_values()
    warn_of_dense(model, adapter, weights)
    resolved = with_profile(resolved, id_profile, weights, owners, published=published)
    if isinstance(statistics, (str, Path)):
        statistics = Statistics.load(statistics)
    context = Context(
        model,
        adapter,
        weights,
        batches=() if batches is None else batches,
        targets=targets,
        published=published,
        owners=owners,
        floor=floor,
        seed=seed,
        statistics=statistics,
        limit=limit,
        autocast=autocast_of(autocast),
        skip_nonfinite=skip_nonfinite,
        walk=walk,
        tokens=None if tokens is None else selection_of(tokens),
        memory_budget=None if memory_budget is None else bytes_of(memory_budget),
        workplace=workplace,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        progress=progress,
    )
    resolved.check(context)
    with no_exit(f"method {resolved.name!r}"), buffers_kept(model):
        masks = resolved.run(context)
    for each in masks:
        if not each.removed:
            _log.warning(
                "the masks of sparsity %s remove nothing: the model stays dense",
                each.manifest.sparsity,
            )
    return masks[0] if single else masks


@checked_arguments
@neutral_state()
@takes_model
def gather(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: str | Scorer | Solver | Method = "multiflow",
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
        statistics = vlp.gather(model, data)
        statistics.save("statistics.safetensors")
        masks = vlp.prune(model, sparsity=[0.63, 0.75, 0.9], statistics=statistics)

    Arguments are those of `prune`. `method` is a registered name, a `Scorer` or a `Composition`;
    statistics for `id*NAME` are those for NAME, and those of one variant do not serve the other.
    Those of gradients are kept apart for the even and the odd batches, for `split_half`: 16 bytes
    for each weight, where `prune` takes 8.

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
    weights = WeightMap.of(model, adapter)
    weights.check_values()
    context = Context(
        model,
        adapter,
        weights,
        batches=batches,
        published=is_published(variant),
        limit=limit,
        autocast=autocast_of(autocast),
        skip_nonfinite=skip_nonfinite,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        progress=progress,
        halves=True,
    )
    with buffers_kept(model):
        statistics = composition.gather(context)
    assert statistics is not None  # _reading makes sure that there is something to gather
    return statistics


@checked_arguments
@neutral_state()
@takes_model
def split_half(
    model: nn.Module,
    statistics: Statistics,
    *,
    method: str | Scorer | Solver | Method = "multiflow",
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
        statistics = vlp.gather(model, data)
        for modality, overlap in vlp.split_half(model, statistics, sparsity=0.75).items():
            print(f"{modality}: {overlap.agreement:.1%} of the elements agree")

    Arguments are those of `prune`, with one sparsity. `statistics`, which know their variant, are
    what `gather` returned, of at least two batches; dimensions are read from `id_profile` and not
    measured here.

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
    weights = WeightMap.of(model, adapter)
    published = statistics.published
    composition = _reading(with_profile(resolved, id_profile, weights, owners, published=published))
    context = Context(
        model,
        adapter,
        weights,
        targets=targets,
        published=published,
        owners=owners,
        floor=floor,
        seed=seed,
    )
    even, odd = (composition.masks(context, statistics, half=half)[0] for half in (0, 1))
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
        profile = vlp.measure_id(model, data)
        profile.save("dimensions.json")
        masks = vlp.prune(model, data, method="id*multiflow", sparsity=0.75, id_profile=profile)

    Args:
        model: see `prune`. It is left as it is.
        batches: a list or a loader without shuffling, which is read once per pass; some hundred
            samples or more.
        adapter: see `prune`.
        estimator: how a dimension is made of points; None: TwoNN on all points, in the published
            variant the mean over 1 to 20 blocks.
        padding: `real`: a point holds a sample's real tokens, then zeros, so that it is the same in
            every batch; `published`: also the outputs for padding. None: `real`, or
            `published` in the published variant.
        dtype: that points are kept in; None: that of the outputs. `bfloat16` halves the memory and
            loses digits.
        memory_budget: what points and the search for neighbours may take in addition to the model,
            such as `"8GiB"`; None: three quarters of what is free. It decides how many passes over
            the batches there are, and changes no result.
        variant: `published` follows the published code in all of this.
        limit: number of batches to read; None reads all.
        workplace: folder that keeps what is known after every pass.
        resume: resume from there.
        progress: called with (batches done, batches of all passes or None).

    Raises:
        VlpError: see `vlp_plugins.dimension.measure.measure`.
    """
    adapter = resolve_adapter(model, adapter)
    weights = WeightMap.of(model, adapter)
    weights.check_values()
    with buffers_kept(model):
        return measure(
            model,
            adapter,
            weights,
            batches,
            estimator=estimator,
            padding=padding,
            dtype=dtype_of(dtype),
            memory_budget=None if memory_budget is None else bytes_of(memory_budget),
            published=is_published(variant),
            limit=limit,
            workplace=None if workplace is None else Path(workplace),
            resume=resume,
            progress=progress,
        )
