"""prune(): the one place where the parts meet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from vlp_plugins.calibration.batches import check_batches, say_if_fewer
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import composed, make_masks
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.methods.method import Context, Method, Procedure
from vlp_plugins.methods.resolve import (
    resolve_adapter,
    resolve_method,
    resolve_profile,
    resolve_targets,
    with_pattern,
    with_profile,
)
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.inspection import warn_of_dense
from vlp_plugins.models.request import Owners, Target, Variant, checked_arguments, is_published
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import StatisticsError, no_exit
from vlp_plugins.runtime.memory import bytes_of
from vlp_plugins.runtime.model_state import autocast_of, neutral_state, takes_model
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.score import Scorer

_log = logging.getLogger(__name__)


@overload
def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    sparsity: Target | None = None,
    method: str | Scorer | Method = ...,
    **options: Any,
) -> Masks: ...


@overload
def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    sparsity: Sequence[Target],
    method: str | Scorer | Method = ...,
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
    method: str | Scorer | Method = "multiflow",
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
    memory_budget: int | str | None = None,
    workplace: Path | None = None,
    id_profile: IdProfile | str | Path | None = None,
    **parameters: Any,
) -> Masks | list[Masks]:
    """Finds which weights of a model to remove. The model itself is left as it is.

    Args:
        model: any module that an adapter claims; see `ModuleAdapter` for others.
            Under `torchrun` it may be sharded by `fully_shard`: call `prune` in every process with
            the same batches; leave whole (`ignored_params`) scalars and what its losses change.
        batches: calibration batches, for methods that need data; read once by a `Composition`, and
            perhaps several times by a `Procedure`, which needs a list or a loader then.
        sparsity: fraction removed in [0, 1), by modality if a mapping; several make several masks
            from one pass over the data. Left out with a `Pattern`, which fixes it.
        method: registered name, a `Scorer` (with global allocation), `Composition` or `Procedure`.
            `id*NAME` is NAME with the importance of every layer multiplied by the intrinsic
            dimension of what it gives out.
        adapter: name (`module` for any module) or instance; None asks every adapter.
        allocation: how the target is shared out among tensors; None: the method's published way;
            `id`: budgets per modality in proportion to its intrinsic dimension.
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
        memory_budget: how much gradients may take beside the model, bytes or `"8GiB"`; for methods
            that keep the gradients of many batches. It holds for the points that dimensions are
            measured from, too.
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
    resolved = resolve_method(method, allocation, targets, parameters)
    targets = with_pattern(targets, resolved.allocation)
    published = is_published(variant)
    profile = resolve_profile(id_profile)
    weights = WeightMap.of(model, adapter)
    warn_of_dense(model, adapter, weights)
    resolved = with_profile(resolved, profile, weights, owners, published=published)
    if isinstance(resolved, Procedure):
        masks = _run(
            resolved,
            statistics,
            Context(
                model,
                adapter,
                weights,
                batches=() if batches is None else batches,
                targets=targets,
                published=published,
                owners=owners,
                floor=floor,
                seed=seed,
                limit=limit,
                autocast=autocast_of(autocast),
                skip_nonfinite=skip_nonfinite,
                memory_budget=None if memory_budget is None else bytes_of(memory_budget),
                workplace=workplace,
                resume=resume,
                progress=progress,
            ),
        )
        return _result(masks, single)
    composition = composed(resolved)
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
            autocast=autocast_of(autocast),
            skip_nonfinite=skip_nonfinite,
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
    return _result(masks, single)


def _result(masks: list[Masks], single: bool) -> Masks | list[Masks]:
    """What `prune` returns; says so of masks that remove nothing."""
    for each in masks:
        if not each.removed:
            _log.warning(
                "the masks of sparsity %s remove nothing: the model stays dense",
                each.manifest.sparsity,
            )
    return masks[0] if single else masks


def _run(method: Procedure, statistics: object, context: Context) -> list[Masks]:
    if statistics is not None and isinstance(method, IdGuided):
        raise StatisticsError(
            f"{method.name!r} measures the model's intrinsic dimensions from batches, and cannot "
            "use statistics of an earlier pass; measure them by measure_id and give id_profile"
        )
    if statistics is not None:
        raise StatisticsError(
            f"method {method.name!r} runs the model as it goes and cannot use statistics of an "
            "earlier pass; give batches"
        )
    if method.reads_data and isinstance(context.batches, tuple) and not context.batches:
        raise StatisticsError(f"method {method.name!r} needs data: give batches")
    if method.reads_data:
        check_batches(context.batches, context.limit)
    measures = isinstance(method, IdGuided)  # which says it itself
    if method.reads_data and not measures and isinstance(context.batches, Sized):
        say_if_fewer(len(context.batches), context.limit)
    context.weights.check_finite()
    with no_exit(f"method {method.name!r}"):
        return method.run(context)
