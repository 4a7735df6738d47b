"""The folder of results: masks, tables, report, recipe, statistics, and models if asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.job.dimensions import PROFILE
from vlp_plugins.job.facts import StopWatch, keeps_statistics
from vlp_plugins.job.prepared import Prepared
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.inspection import inspect_model
from vlp_plugins.models.saving import restored, write_model
from vlp_plugins.recipes.command import command_of
from vlp_plugins.recipes.recipe import Recipe
from vlp_plugins.report.layers import layer_rows, to_csv
from vlp_plugins.report.page import Run, Table, check_can_render, render
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.runtime.version import __version__

_log = logging.getLogger(__name__)

Finish = Callable[[Prepared, Mapping[str, Masks], Path], None]
"""Adds to a folder of results before it gets its name."""


def write_results(
    job: Prepared,
    out: Path,
    masks: Mapping[str, Masks],
    statistics: Statistics | None,
    tables: Sequence[Table],
    watch: StopWatch,
    facts: Callable[[], Mapping[str, str]],
    profile: IdProfile | None = None,
    finish: Finish | None = None,
) -> None:
    """Fills the folder; the report comes after the rest, so that it knows what that took.

    Args:
        job: what was run.
        out: the folder, new or empty.
        masks: by title.
        statistics: None for a method that gathers none.
        tables: for the report.
        watch: gets the lap of writing.
        facts: what the report shows at its end.
        profile: intrinsic dimensions that the run measured; None if it measured none.
        finish: called at the end with the job, the masks and the folder; may change the model.

    Raises:
        OutputError: if it exists or cannot be written; nothing of it is left then.
    """
    rows = layer_rows(job.weights, list(masks.values()))
    with atomic_folder(out) as folder:
        for title, each in masks.items():
            each.save(folder / f"masks-{title}.safetensors")
        (folder / "layers.csv").write_text(to_csv(rows, list(masks)), encoding="utf-8")
        (folder / "recipe.yaml").write_text(recipe_text(job.recipe), encoding="utf-8")
        if statistics is not None and keeps_statistics(job, statistics):
            statistics.save(folder / "statistics.safetensors")
        if profile is not None:
            profile.save(folder / PROFILE)
        if job.recipe.save_model:
            _write_models(job, folder, masks)
        watch.lap("writing")
        _write_report(job, folder, masks, tables, facts)
        if finish is not None:
            finish(job, masks, folder)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as `vlp prune` reads it; what has its standard value is left out.

    The method is always named, so that it does not depend on what the standard is.
    """
    standard = asdict(Recipe()) | {"method": None}
    filled = _filled(asdict(recipe), standard)
    head = f"# Written by vlp_plugins {__version__}. To run it again: "
    text = yaml.safe_dump(filled, sort_keys=False, allow_unicode=True)
    return f"{head}vlp prune recipe.yaml --out NEW_FOLDER\n{text}"


def _filled(values: Mapping[str, Any], standard: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the standard, with lists for tuples, which YAML does not know."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if value == standard[key]:
            continue
        if key == "data":
            found[key] = _filled(value, standard[key])
        else:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def _write_report(
    job: Prepared,
    folder: Path,
    masks: Mapping[str, Masks],
    tables: Sequence[Table],
    facts: Callable[[], Mapping[str, str]],
) -> None:
    try:
        check_can_render()
    except UnsupportedError as error:  # the packages of an extra are missing
        _log.warning("%s", error)
        return
    page = render(f"vlp prune: {job.recipe.method}", [_section(job, masks, tables, facts())])
    (folder / "report.html").write_text(page, encoding="utf-8")


def _section(
    job: Prepared, masks: Mapping[str, Masks], tables: Sequence[Table], facts: Mapping[str, str]
) -> Run:
    return Run(
        f"{job.recipe.method} on {Path(str(job.recipe.model)).name}",
        command_of(job.recipe),
        inspect_model(job.model, job.adapter),
        masks,
        facts,
        tables,
    )


def _write_models(job: Prepared, folder: Path, masks: Mapping[str, Masks]) -> None:
    """One pruned model per mask set; the dense weights are back afterwards."""
    for title, each in masks.items():
        with restored(job.weights):
            each.apply(job.model, job.adapter)
            write_model(job.model, folder / f"model-{title}", source=job.recipe.model)
