"""`vlp prune` from end to end: load, read the data once, make masks, write a folder of results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from vlp_plugins.adapter import Adapter
from vlp_plugins.allocation import Target
from vlp_plugins.atomic import atomic_folder, check_new_folder
from vlp_plugins.calibration import calibrate
from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.data.processors import Processor, load_processor
from vlp_plugins.data.sources import open_source
from vlp_plugins.errors import RecipeError, UnsupportedError
from vlp_plugins.inspection import inspect_model
from vlp_plugins.loading import load_model
from vlp_plugins.masks import Masks
from vlp_plugins.memory import peak_resident_bytes
from vlp_plugins.methods.base import Composition
from vlp_plugins.pruning import is_published, make_masks, resolve_method, targets_of
from vlp_plugins.recipes import Recipe, command_of
from vlp_plugins.report.layers import layer_rows, to_csv
from vlp_plugins.report.page import Run, Table, render
from vlp_plugins.saving import write_model
from vlp_plugins.statistics.store import Statistics
from vlp_plugins.weights import WeightMap

_log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Prepared:
    """Everything that a recipe names, loaded and checked; no data has been read."""

    recipe: Recipe
    model: nn.Module
    adapter: Adapter
    method: Composition
    targets: list[Target]
    weights: WeightMap

    @property
    def published(self) -> bool:
        """Whether the published variant is asked for."""
        return is_published(self.recipe.variant)

    def processor(self) -> Processor:
        """The processor of the model."""
        source = self.recipe.processor or self.recipe.model
        return load_processor(str(source), max_length=self.recipe.data.max_length)

    def batches(self) -> CaptionedBatches:
        """The calibration batches.

        Raises:
            RecipeError: if the method reads data and the recipe names none.
        """
        data = self.recipe.data
        if data.source is None:
            raise RecipeError(
                f"method {self.method.name!r} reads calibration data: give --data FOLDER (images "
                "with metadata.jsonl), or --statistics FILE of an earlier run"
            )
        source = open_source(
            data.source,
            split=data.split,
            image_column=data.image_column,
            caption_column=data.caption_column,
        )
        return CaptionedBatches(
            source,
            self.processor(),
            self.adapter,
            data.batch_size,
            limit=data.batches,
            shuffle_seed=data.seed,
        )

    def masks(self, statistics: Statistics | None, *, half: int | None = None) -> list[Masks]:
        """Masks for every target; `half` uses every other batch only."""
        return make_masks(
            self.weights,
            self.method,
            self.targets,
            statistics,
            floor=self.recipe.floor,
            owners=self.recipe.owners,  # type: ignore[arg-type]
            published=self.published,
            seed=self.recipe.seed,
            half=half,
        )


@dataclass(frozen=True)
class Result:
    """What a run made: the folder, the masks by title, and facts about the run."""

    out: Path
    masks: Mapping[str, Masks]
    facts: Mapping[str, str]


def prepare(recipe: Recipe) -> Prepared:
    """Loads the model and resolves every name, so that mistakes show before the work."""
    recipe.need("model")
    asked = list(recipe.sparsity) or None
    method = resolve_method(recipe.method, recipe.allocation, asked, recipe.parameters)
    targets = targets_of(asked, method.allocation)
    model, adapter = load_model(
        str(recipe.model), adapter=recipe.adapter, dtype=recipe.dtype, device=recipe.device
    )
    return Prepared(recipe, model, adapter, method, targets, WeightMap.of(model, adapter))


def run(recipe: Recipe, *, progress: Progress | None = None, resume: bool = False) -> Result:
    """Prunes as the recipe says and writes `recipe.out` whole or not at all.

    The folder holds `masks-SPARSITY.safetensors`, `layers.csv`, `report.html`, `recipe.yaml`,
    `statistics.safetensors` if data was read, and with `save_model` a folder `model-SPARSITY`.
    While data is read, a checkpoint lies beside the folder as `OUT.checkpoint`.

    Args:
        recipe: what to do.
        progress: called with (batches done, batches in all or None).
        resume: continue from the checkpoint of an interrupted run.

    Raises:
        VlpError: with one line that says what to do.
    """
    recipe.need("model", "out")
    out = Path(str(recipe.out))
    check_new_folder(out)
    begin = time.perf_counter()
    job = prepare(recipe)
    loaded = time.perf_counter()
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    statistics = _statistics(job, checkpoint, progress=progress, resume=resume)
    gathered = time.perf_counter()
    masks = job.masks(statistics)
    named = {title_of(t): m for t, m in zip(job.targets, masks, strict=True)}
    tables = [_agreement(job, statistics, named)] if job.method.needs else []
    facts = {
        "loading": f"{loaded - begin:.1f} s",
        "data pass": f"{gathered - loaded:.1f} s",
        "masks": f"{time.perf_counter() - gathered:.1f} s",
        "peak memory of the process": f"{peak_resident_bytes() / 1e9:.2f} GB",
        **_data_facts(statistics),
    }
    _write(job, out, named, statistics, facts, tables)
    checkpoint.unlink(missing_ok=True)
    return Result(out, named, facts)


def title_of(target: Target) -> str:
    """`0.75`, or `vision=0.5,text=0.8`."""
    if isinstance(target, Mapping):
        return ",".join(f"{name}={value:g}" for name, value in target.items())
    return f"{target:g}"


def _statistics(
    job: Prepared, checkpoint: Path, *, progress: Progress | None, resume: bool
) -> Statistics | None:
    if not job.method.needs:
        return None
    if job.recipe.statistics is not None:
        return Statistics.load(job.recipe.statistics)
    return calibrate(
        job.model,
        job.adapter,
        job.weights,
        job.batches(),
        job.method.needs,
        published=job.published,
        checkpoint=checkpoint,
        checkpoint_every=job.recipe.checkpoint_every,
        resume=resume,
        progress=progress,
    )


def _agreement(job: Prepared, statistics: Statistics | None, masks: Mapping[str, Masks]) -> Table:
    """How alike the masks from either half of the batches are: was that enough data?"""
    rows = []
    if statistics is not None and min(statistics.samples) > 0:
        halves = [job.masks(statistics, half=half) for half in (0, 1)]
        for title, one, other in zip(masks, *halves, strict=True):
            overlaps = one.compare(other)
            rows += [
                [title, name, f"{o.agreement:.3%}", f"{o.iou:.4f}"] for name, o in overlaps.items()
            ]
    return Table(
        "Was that enough data?",
        ["sparsity", "modality", "equal elements", "kept by both / by either"],
        rows,
        note="Masks from the even and the odd batches alone, compared. The closer to 1, the less "
        "more data would change; with a single batch there is nothing to compare.",
    )


def _data_facts(statistics: Statistics | None) -> dict[str, str]:
    if statistics is None:
        return {"calibration data": "none needed"}
    return {
        "calibration data": f"{sum(statistics.samples)} samples in {statistics.batches} batches",
        "fingerprint of the data": statistics.fingerprint,
    }


def _write(
    job: Prepared,
    out: Path,
    masks: Mapping[str, Masks],
    statistics: Statistics | None,
    facts: Mapping[str, str],
    tables: list[Table],
) -> None:
    recipe = job.recipe
    rows = layer_rows(job.weights, list(masks.values()))
    section = Run(
        f"{recipe.method} on {Path(str(recipe.model)).name}",
        command_of(recipe),
        inspect_model(job.model, job.adapter),
        masks,
        facts,
        tables,
    )
    try:
        page = render(f"vlp prune: {recipe.method}", [section])
    except UnsupportedError as error:  # the packages of an extra are missing
        _log.warning("%s", error)
        page = None
    with atomic_folder(out) as folder:
        for title, each in masks.items():
            each.save(folder / f"masks-{title}.safetensors")
        (folder / "layers.csv").write_text(to_csv(rows, list(masks)), encoding="utf-8")
        (folder / "recipe.yaml").write_text(_yaml(recipe), encoding="utf-8")
        if page is not None:
            (folder / "report.html").write_text(page, encoding="utf-8")
        if statistics is not None:
            statistics.save(folder / "statistics.safetensors")
        if recipe.save_model:
            _write_models(job, folder, masks)


def _yaml(recipe: Recipe) -> str:
    """The recipe as `vlp prune` reads it; what is not set is left out."""

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        filled = {k: kept(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in filled.items()
                if v is not None and v != {} and v != ()}  # fmt: skip

    return str(yaml.safe_dump(kept(asdict(recipe)), sort_keys=False))


def _write_models(job: Prepared, folder: Path, masks: Mapping[str, Masks]) -> None:
    """One pruned model per mask set; the dense weights are restored in between."""
    dense = {name: weight.parameter.detach().cpu().clone() for name, weight in job.weights.items()}
    for title, each in masks.items():
        each.apply(job.model, job.adapter)
        write_model(job.model, folder / f"model-{title}", source=job.recipe.model)
        with torch.no_grad():
            for name, weight in job.weights.items():
                weight.parameter.copy_(dense[name])
