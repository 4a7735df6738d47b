"""How good the model of a trial is: recall of retrieval, or the pre-training loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.data.records import CaptionSource
from vlp_plugins.data.sources import open_source
from vlp_plugins.hosts.nni.overlay import PAIRS, Metric, TrialSettings
from vlp_plugins.jobs.inputs import batches_for
from vlp_plugins.jobs.preparation import Prepared
from vlp_plugins.jobs.recipes import DataRecipe, Recipe, need
from vlp_plugins.models.adapter import Batch, RetrievalAdapter
from vlp_plugins.runtime.errors import DataError, NonFiniteError, RecipeError
from vlp_plugins.tasks.retrieval import retrieval

DEFAULT = "default"
"""The value that tuners look at; here the higher, the better."""


def check_test(
    recipe: Recipe,
    settings: TrialSettings,
    opened: Callable[[str, DataRecipe], CaptionSource] | None = None,
) -> None:
    """Makes sure that there are pairs to measure on, before the work.

    Args:
        recipe: of the trial.
        settings: of the trial.
        opened: opens a source; for whoever checks several trials on the same data.

    Raises:
        RecipeError: if nobody said where they come from.
        DataError: if there are none, or fewer than `settings` ask for.
    """
    data = recipe.data
    if settings.test is None:
        need(recipe, "data.source")
        if data.batches is None:
            raise RecipeError(
                "the recipe may read all of its data, and what is read is not measured on: give "
                "--test FOLDER, or the recipe's `data: {batches: ...}`"
            )
    source = (opened or source_of)(str(settings.test or data.source), data)
    read = 0 if settings.test is not None or data.batches is None else data.batches
    left = None if source.length is None else source.length - read * data.batch_size
    if left is not None and left < 2:
        raise _nothing_left(data)
    if left is not None and settings.pairs is not None and left < settings.pairs:
        after = f" after the {read} batches of {data.batch_size} that are read" if read else ""
        raise DataError(
            f"{source.description} has {left} pairs{after}, and --pairs asks for {settings.pairs}; "
            f"give --pairs {left}, --test FOLDER, or fewer batches"
        )


def source_of(source: str, data: DataRecipe) -> CaptionSource:
    """Opens the pairs at a place, with the columns and the split of a recipe.

    Raises:
        DataError: if there are none.
    """
    return open_source(
        source,
        split=data.split,
        image_column=data.image_column,
        caption_column=data.caption_column,
    )


def measured_batches(job: Prepared, settings: TrialSettings) -> list[Batch]:
    """The batches that are measured on; none of them is read for pruning or fine-tuning.

    Raises:
        DataError: if there are none.
    """
    data = job.recipe.data
    wanted = -(-(settings.pairs or PAIRS) // data.batch_size)
    source, skipped = settings.test, 0
    if source is None:
        source, skipped = str(data.source), data.batches or 0
    data = replace(data, batches=skipped + wanted)
    found = list(islice(batches_for(source, data, job.processor(), job.adapter), skipped, None))
    if not found:
        raise _nothing_left(job.recipe.data)
    return found


def _nothing_left(data: DataRecipe) -> DataError:
    return DataError(
        f"{data.source} has no pairs after the {data.batches} batches of {data.batch_size} that "
        "the recipe reads, so there is nothing to measure on; give --test FOLDER, or fewer batches"
    )


class Yardstick:
    """Measures one model, again and again; the same model gives the same figures."""

    def __init__(self, job: Prepared, batches: Sequence[Batch], metric: Metric) -> None:
        """Nothing is run yet.

        Args:
            job: its model is measured and left as it is found.
            batches: pairs of images and texts.
            metric: `auto` takes recall if the adapter embeds images and texts.
        """
        self._job = job
        self._batches = batches
        self.metric = metric
        if metric == "auto":
            self.metric = "recall" if isinstance(job.adapter, RetrievalAdapter) else "loss"

    def measure(self) -> dict[str, float]:
        """The figures by name; `default` is what a tuner makes as high as it can.

        Recall in per cent at 1, 5 and 10 both ways, of which `default` is the mean; or the mean of
        the batches' loss, of which `default` is the negative.

        Raises:
            UnsupportedError: if the family does not embed images and texts, or has no loss.
            NonFiniteError: if the loss is NaN or infinite, which no tuner can read.
        """
        if self.metric == "loss":
            return self._loss()
        recall = retrieval(self._job.model, self._job.adapter, self._batches)
        named = recall.as_dict()
        return {DEFAULT: named.pop("mean"), **named}

    def _loss(self) -> dict[str, float]:
        job = self._job
        with LossProbe(job.model, job.adapter, job.weights).attached(()) as probe:
            losses = [probe.loss(batch, index) for index, batch in enumerate(self._batches)]
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss of the pruned model is {loss}, which is no result that a tuner could "
                "compare; the trial counts as failed: search lower sparsities or learning rates"
            )
        return {DEFAULT: -loss, "loss": loss}
