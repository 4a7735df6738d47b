"""What a recipe or a command line names, loaded and checked before any work is done."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.calibration.selections import selection_of
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.data.batches import CaptionedBatches, open_batches
from vlp_plugins.data.processors import Processor
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.jobs.recipes import DataRecipe, Recipe, need
from vlp_plugins.loading import load_model, load_structure, processor_for
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition, composed
from vlp_plugins.methods.guided import Guided, IdGuided, Measuring
from vlp_plugins.methods.method import Context, Method, Procedure
from vlp_plugins.methods.resolve import (
    resolve_method,
    resolve_profile,
    resolve_targets,
    with_pattern,
    with_profile,
)
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.architecture import has_no_weights
from vlp_plugins.models.request import Owners, Target, is_published, new_values_bytes
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import made_by, versions
from vlp_plugins.runtime.errors import (
    RecipeError,
    SparsityError,
    StatisticsError,
    UnsupportedError,
)
from vlp_plugins.runtime.memory import bytes_of
from vlp_plugins.runtime.model_state import autocast_of
from vlp_plugins.runtime.offload import device_of
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.score import Evidence
from vlp_plugins.scoring.selection import Scored


def batches_for(
    source: str,
    data: DataRecipe,
    processor: Processor,
    adapter: Adapter,
    model: nn.Module | None = None,
) -> CaptionedBatches:
    """The batches of a source of pairs that are read as a recipe says; its own is not used.

    Raises:
        DataError: if there is no data.
    """
    return open_batches(
        source,
        processor,
        adapter,
        data.batch_size,
        limit=data.batches,
        shuffle_seed=data.seed,
        split=data.split,
        image_column=data.image_column,
        caption_column=data.caption_column,
        workers=data.workers,
        model=model,
    )


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and how it is loaded, as the command line says it."""

    model: str
    adapter: str | None = None
    processor: str | None = None
    dtype: str = "auto"
    device: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it; no data has been read."""

    source: ModelSource
    model: nn.Module
    adapter: Adapter
    weights: WeightMap
    processor: Processor

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @classmethod
    def of(
        cls,
        source: ModelSource,
        *,
        max_length: int | None = None,
        prompt: str | None = None,
        max_pixels: int | None = None,
    ) -> Loaded:
        """Loads and checks; the other arguments are those of `processor_for`.

        Raises:
            VlpError: if something is unknown, missing or damaged.
        """
        model, adapter = load_model(
            source.model, adapter=source.adapter, dtype=source.dtype, device=source.device
        )
        weights = WeightMap.of(model, adapter)
        weights.check_finite()
        place = source.processor or source.model
        processor = processor_for(
            model, adapter, place, max_length=max_length, prompt=prompt, max_pixels=max_pixels
        )
        return cls(source, model, adapter, weights, processor)

    def record(self, schema: int, command: str) -> dict[str, Any]:
        """How a JSON file of results begins: what made it, and of which model."""
        return {
            "schema": schema,
            "made_by": made_by(),
            "versions": versions(),
            "command": command,
            "model": self.source.model,
            "adapter": self.adapter.name,
        }

    def batches(self, data: DataRecipe) -> CaptionedBatches:
        """Batches of captioned images; `DataError` if there are none."""
        return batches_for(str(data.source), data, self.processor, self.adapter, self.model)


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that a recipe names, loaded and checked; no data has been read."""

    recipe: Recipe
    model: nn.Module
    adapter: Adapter
    method: Method
    targets: Sequence[Target]
    weights: WeightMap

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @property
    def by_blocks(self) -> bool:
        """Whether the method walks block by block."""
        return self.method.walk_of(self.context()) == "blocks"

    @property
    def new_values_bytes(self) -> int:
        """About what new values of all targets take in the files of masks; 0 without any."""
        method = self.method.method if isinstance(self.method, Guided) else self.method
        if not method.changes_weights:
            return 0
        return new_values_bytes(self.weights.values(), self.targets)

    @property
    def published(self) -> bool:
        """Whether the published variant is asked for."""
        return is_published(self.recipe.variant)

    def guided(self, profile: IdProfile) -> Prepared:
        """The same with a method that knows the intrinsic dimensions it needs.

        Raises:
            UnsupportedError: if it needs none.
            StatisticsError: if the profile is of another model.
        """
        owners: Owners | None = self.recipe.owners  # type: ignore[assignment]
        method = with_profile(self.method, profile, self.weights, owners, published=self.published)
        return replace(self, method=method)

    def processor(self) -> Processor:
        """The processor of the model; `DataError` if there is none."""
        source, data = str(self.recipe.processor or self.recipe.model), self.recipe.data
        return processor_for(self.model, self.adapter, source, **data.of_processor)

    def batches(self) -> CaptionedBatches:
        """The calibration batches; a model of images only gets them without captions.

        Raises:
            RecipeError: if the method reads data and the recipe names none.
            DataError: if there is no data, or no processor.
        """
        data = self.recipe.data
        if data.source is None:
            raise RecipeError(
                f"method {self.method.name!r} reads calibration data: give --data FOLDER (images "
                "with metadata.jsonl)"
                + (f", or {self._instead} of an earlier run" if self._instead else "")
            )
        return batches_for(data.source, data, self.processor(), self.adapter, self.model)

    @property
    def _instead(self) -> str:
        """The options that the method takes in place of data."""
        method = self.method.method if isinstance(self.method, IdGuided) else self.method
        statistics = "--statistics FILE" if method.reads_data else ""
        if not isinstance(method, Composition):
            return ""
        if method is self.method:
            return statistics
        return " and ".join(filter(None, ("--id-profile FILE", statistics)))

    def context(
        self,
        batches: Iterable[Batch] = (),
        *,
        workplace: Path | None = None,
        checkpoint: Path | None = None,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> Context:
        """What the method works with; without batches for its cost only."""
        recipe = self.recipe
        return Context(
            self.model,
            self.adapter,
            self.weights,
            batches=batches,
            targets=self.targets,
            published=self.published,
            owners=recipe.owners,  # type: ignore[arg-type]
            floor=recipe.floor,
            seed=recipe.seed,
            limit=recipe.data.batches,
            autocast=autocast_of(recipe.autocast),
            skip_nonfinite=recipe.skip_nonfinite,
            walk=recipe.walk,  # type: ignore[arg-type]
            tokens=None if recipe.tokens is None else selection_of(recipe.tokens),
            memory_budget=None if recipe.memory_budget is None else bytes_of(recipe.memory_budget),
            workplace=workplace,
            checkpoint=checkpoint,
            checkpoint_every=recipe.checkpoint_every,
            resume=resume,
            progress=progress,
        )

    def masks(self, statistics: Statistics | None, *, half: int | None = None) -> list[Masks]:
        """Masks of a composition for every target; `half` uses every other batch only."""
        return composed(self.method).masks(self.context(), statistics, half=half)


def prepare(recipe: Recipe, *, planned: bool = False) -> Prepared:
    """Loads the model and resolves every name, so that mistakes show before the work.

    A folder with a configuration and no weights will do if the run is only planned; the model is
    then on the meta device.

    Raises:
        VlpError: if a name is unknown, a sparsity impossible, or the model cannot be pruned.
    """
    need(recipe, "model")
    method, targets, profile = resolve_names(recipe)
    if has_no_weights(Path(str(recipe.model)).expanduser()):
        if not planned:
            raise UnsupportedError(
                f"{recipe.model} has a configuration and no weights, which `vlp inspect` and "
                "`vlp plan` read; to prune, give the folder with the weights"
            )
        model, adapter = load_structure(str(recipe.model), adapter=recipe.adapter)
        weights = WeightMap.of(model, adapter)
        return Prepared(recipe, model, adapter, method, targets, weights)
    model, adapter = load_model(
        str(recipe.model), adapter=recipe.adapter, dtype=recipe.dtype, device=recipe.device
    )
    weights = WeightMap.of(model, adapter)
    weights.check_finite()
    job = Prepared(recipe, model, adapter, method, targets, weights)
    method.walk_of(job.context())
    half = any(weight.parameter.dtype == torch.float16 for weight in weights.values())
    if half and method.takes_gradients and recipe.statistics is None:
        _log.warning(
            "the model is in float16, in which small gradients are lost (those below 6e-8 are 0); "
            "--dtype bfloat16 keeps them"
        )
    if profile is not None:
        job = job.guided(profile)
    if recipe.allocation or recipe.floor or any(isinstance(t, Mapping) for t in targets):
        try_allocation(job.method, targets, weights, recipe.floor)
    return job


def resolve_names(recipe: Recipe) -> tuple[Method, list[Target], IdProfile | None]:
    """What a recipe names but for its model and data, which are not loaded.

    Raises:
        VlpError: if a name is unknown, a sparsity impossible, or one thing excludes another.
    """
    targets, _ = resolve_targets(recipe.sparsity or None)
    method = resolve_method(
        recipe.method, recipe.allocation, targets, recipe.parameters, recipe.walk, recipe.tokens
    )
    profile = resolve_profile(recipe.id_profile)
    targets = with_pattern(targets, method.allocation)
    _check_targets(targets, recipe.floor)
    if isinstance(method, Measuring) and recipe.statistics is not None:
        raise StatisticsError(
            f"allocation {method.method.allocation.name!r} runs the model before it allocates, "
            "which statistics of an earlier pass do not replace; give --data in their place"
        )
    if isinstance(method, IdGuided) and profile is None and recipe.statistics is not None:
        raise StatisticsError(
            f"{method.name!r} measures the model's intrinsic dimensions from data; give "
            "--id-profile FILE together with --statistics, or --data in its place"
        )
    inner = method.method if isinstance(method, IdGuided) else method
    if isinstance(inner, Procedure) and recipe.statistics is not None:
        raise StatisticsError(
            f"method {method.name!r} runs the model as it goes and cannot use statistics of an "
            "earlier pass; leave --statistics out and give --data"
        )
    return method, targets, profile


def title_of(target: Target) -> str:
    """`0.75`, or `vision=0.5,text=0.8`: names files, columns and tables."""
    if isinstance(target, Mapping):
        return ",".join(f"{name}={value:.10g}" for name, value in target.items())
    return f"{target:.10g}"


def try_allocation(
    method: Method, targets: Sequence[Target], weights: WeightMap, floor: float
) -> None:
    """Allocates by magnitude: what cannot be met shows here, not after hours of reading data."""
    evidence = {name: Evidence(name) for name in weights}
    method.allocation.select(Scored(Magnitude(), weights, evidence), targets, floor=floor)


def _check_targets(targets: Sequence[Target], floor: float) -> None:
    titles = [title_of(target) for target in targets]
    if twice := next((title for title in titles if titles.count(title) > 1), None):
        raise SparsityError(f"sparsity {twice} is given twice; each makes one set of masks")
    highest = max(max(t.values()) if isinstance(t, Mapping) else t for t in targets)
    if not 0 <= floor < 1 or 1 - floor < highest:
        raise SparsityError(
            f"a floor of {floor:g} and sparsity {highest:g} exclude each other: each layer keeps "
            f"at least the floor, so at most {max(0.0, 1 - floor):g} can be removed; lower one"
        )
