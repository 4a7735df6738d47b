"""What the trials of an experiment need, checked in seconds before it starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.data.records import CaptionSource
from vlp_plugins.dimension.measure import default_settings
from vlp_plugins.dimension.twonn import check_number
from vlp_plugins.hosts.nni.drawn_settings import TrialSettings
from vlp_plugins.hosts.nni.trial import check_test, source_of
from vlp_plugins.jobs.preparation import Prepared, batches_for, resolve_names, try_allocation
from vlp_plugins.jobs.recipes import DataRecipe, Recipe, need
from vlp_plugins.loading import load_outline
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.guided import Guided, IdGuided
from vlp_plugins.methods.method import Method, Procedure
from vlp_plugins.models.adapter import Batch, RetrievalAdapter
from vlp_plugins.models.request import budget_of
from vlp_plugins.models.saving import check_can_save
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import (
    BatchError,
    DataError,
    OutputError,
    UnsupportedError,
    VlpError,
)
from vlp_plugins.runtime.model_state import default_device, random_state_kept

_log = logging.getLogger(__name__)

_PAIRS = 2


@dataclass
class Preflight:
    """Model, processor, data and files of an experiment, which no tuner may change.

    A model that its configuration alone describes has no values, so what depends on them shows in a
    trial only.

    Attributes:
        prepared: the job of one trial, with that model.
        statistics: of an earlier pass; None: the trials read data.
    """

    prepared: Prepared
    statistics: Statistics | None
    batch: Batch
    _sources: dict[tuple[str | None, ...], CaptionSource] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, settings: TrialSettings) -> Preflight:
        """Opens everything that a trial of the experiment does, and makes a batch of two pairs.

        Raises:
            VlpError: says what is missing, damaged or of another model.
        """
        need(recipe, "model", "out")
        _check_out(Path(str(recipe.out)))
        default_device(recipe.device)
        model, adapter = load_outline(str(recipe.model), adapter=recipe.adapter)
        if recipe.save_model:
            check_can_save(model)
        weights = WeightMap.of(model, adapter)
        method, targets, _ = resolve_names(recipe)
        job = Prepared(recipe, model, adapter, method, targets, weights)
        statistics = None
        if recipe.statistics is not None:
            # A model without values has no hash to compare with that of the statistics.
            statistics = replace(Statistics.load(recipe.statistics), weights_hash="")
        if settings.test is not None and settings.test == recipe.data.source:
            _log.warning(
                "test and data.source are both %s: trials are measured on pairs that they were "
                "pruned by; give other data, or leave test out for the pairs that are not read",
                settings.test,
            )
        processor, data = job.processor(), replace(recipe.data, batch_size=_PAIRS, batches=1)
        batch: Batch = {}
        for source in dict.fromkeys((settings.test, recipe.data.source)):
            if source is not None:
                batch = next(iter(batches_for(source, data, processor, adapter, model)))
        return cls(job, statistics, batch)

    def check(self, recipe: Recipe, settings: TrialSettings) -> None:
        """Checks one trial; `VlpError` says why it would fail."""
        check_test(recipe, settings, self._opened)
        method, targets, profile = resolve_names(recipe)
        job = replace(self.prepared, recipe=recipe, method=method, targets=targets)
        modalities = tuple(job.weights.by_modality())
        for target in targets:
            if isinstance(target, Mapping):
                budget_of(target, modalities)
        if profile is not None:
            job = job.guided(profile)
        if self.statistics is not None:
            self.statistics.check(job.weights, published=job.published)
        elif job.method.reads_data:
            need(recipe, "data.source")
            self._check_data(job)
        with _without_values():
            try_allocation(job.method, targets, job.weights, recipe.floor)
        needs_loss = _needs_loss(job, self.statistics)
        retrieves = isinstance(job.adapter, RetrievalAdapter)
        if settings.metric == "recall" and not retrieves:
            raise UnsupportedError(
                f"adapter {job.adapter.name!r} embeds no images and texts to retrieve by; "
                "give --metric loss"
            )
        by_loss = settings.metric == "loss" or not retrieves or settings.finetune_steps > 0
        if (by_loss or needs_loss) and self._loss_error is not None:
            raise self._loss_error

    def _opened(self, source: str, data: DataRecipe) -> CaptionSource:
        """A source, opened once: indexing a large one takes long."""
        key = (source, data.split, data.image_column, data.caption_column)
        if key not in self._sources:
            self._sources[key] = source_of(source, data)
        return self._sources[key]

    def _check_data(self, job: Prepared) -> None:
        """Fewer batches than asked for would prune all the same, but not as the recipe says.

        If the method measures dimensions, they must be enough for that.
        """
        data = job.recipe.data
        pairs = self._opened(str(data.source), data).length
        if data.batches is None:
            return
        needed = data.batches * data.batch_size
        if pairs is not None:
            whole, rest = divmod(pairs, data.batch_size)
            if whole + (rest > 1) < data.batches:
                raise DataError(
                    f"{data.source} has {pairs} pairs, and {data.batches} batches of "
                    f"{data.batch_size} need {needed}; ask for fewer"
                )
        if isinstance(job.method, IdGuided):
            estimator, _ = default_settings(published=job.published)
            check_number(needed, estimator, what="data.batches times data.batch_size")

    @cached_property
    def _loss_error(self) -> VlpError | None:
        """What is wrong with the loss of the first pairs; without values it may end early."""
        job = self.prepared
        device = next(job.model.parameters()).device
        try:
            with _without_values(), torch.no_grad(), random_state_kept(torch.device("cpu")):
                job.adapter.losses(job.model, to_device(self.batch, device))
        except (UnsupportedError, BatchError) as error:
            return error
        return None


def _needs_loss(job: Prepared, statistics: Statistics | None) -> bool:
    """Whether a method differentiates the loss; a procedure may refuse what it is to do."""
    context = job.context()
    method: Method = job.method.method if isinstance(job.method, Guided) else job.method
    if isinstance(method, Composition):
        return statistics is None and method.takes_gradients
    assert isinstance(method, Procedure)
    with _without_values():
        return method.cost(context).gradient_batches > 0
    return False


@contextmanager
def _without_values() -> Iterator[None]:
    """Ends what needs the values of weights, which are not there; our own errors are raised."""
    try:
        yield
    except VlpError:
        raise
    except Exception:  # tensors without values cannot be branched on
        return


def _check_out(out: Path) -> None:
    """Makes sure that folders can be made in the folder of the experiments."""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"no folder can be made in {nearest} for {out}; choose another out")
