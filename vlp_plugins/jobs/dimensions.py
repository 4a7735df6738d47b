"""`vlp id` from end to end: load, measure, write a folder of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.jobs.facts import (
    StopWatch,
    memory_facts,
    part,
    source_facts,
    step,
    write_report,
)
from vlp_plugins.jobs.preparation import Loaded, ModelSource
from vlp_plugins.jobs.recipes import DataRecipe
from vlp_plugins.jobs.work_dir import claimed, working
from vlp_plugins.pruning import measure_id
from vlp_plugins.report.dimensions import (
    by_modality,
    constant_sentences,
    dimension_by_depth,
    dimension_sentences,
    duplicate_sentences,
    layer_table,
    layers_csv,
    modality_table,
    vision_sentences,
)
from vlp_plugins.report.page import Page, Section, Tile, value_text
from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.files import atomic_folder

PROFILE = "id-profile.json"


@dataclass(frozen=True)
class IdResult:
    """What a run measured; `out` is None if no folder was asked for."""

    profile: IdProfile
    facts: Mapping[str, str]
    out: Path | None


def measure_dimensions(
    load: Callable[[], Loaded],
    data: DataRecipe,
    options: Mapping[str, Any],
    out: Path | None,
    *,
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> IdResult:
    """Measures and writes `out` whole or not at all; process 0 of several writes.

    While it works, the folder `OUT.work` next to it keeps the passes that are done. Without `out`
    nothing is written and nothing kept. `options` are those of `measure_id`: estimator, padding,
    dtype, memory_budget, variant. For the other arguments see `vlp_plugins.jobs`.

    Raises:
        OutputError: if `out` is taken, or if `resume` is asked for without one.
        VlpError: if loading or measuring fails.
    """
    if out is None and resume:
        raise OutputError(
            "--resume continues from what a run keeps next to its folder of results; give the "
            "--out of that run"
        )
    writes = rank_and_size()[0] == 0
    with (
        nullcontext()
        if out is None
        else claimed(out, writes=writes, mark=PROFILE, overwrite=overwrite) as results
    ):
        watch = StopWatch()
        loaded = load()
        batches = loaded.batches(data)
        watch.lap("loading")
        with nullcontext() if results is None else working(results, resume=resume) as work:
            profile = measure_id(
                loaded.model,
                batches,
                adapter=loaded.adapter,
                workplace=work,
                resume=resume,
                progress=progress,
                **options,
            )
        watch.lap("measuring")
        facts = {
            **watch.texts(),
            **memory_facts(loaded.device),
            **source_facts(batches),
            **{name: value_text(value) for name, value in profile.settings.items() if value},
        }
        if results is not None and writes:
            with atomic_folder(results, mark=PROFILE, overwrite=overwrite) as folder:
                profile.save(folder / PROFILE)
                csv = layers_csv(profile.layers)
                (folder / "layers.csv").write_text(csv, encoding="utf-8")
                write_report(
                    folder, lambda: page_of(profile, loaded.source, Path(str(out)), command, facts)
                )
        return IdResult(profile, facts, results)


def summary_of(profile: IdProfile) -> list[str]:
    """What the dimensions say, in sentences."""
    return [
        *dimension_sentences(profile.layers),
        *vision_sentences(profile.layers),
        *duplicate_sentences(profile.layers),
        *constant_sentences(profile),
    ]


def page_of(
    profile: IdProfile, source: ModelSource, out: Path, command: str, facts: Mapping[str, str]
) -> Page:
    """The page."""
    layers, name = profile.layers, Path(source.model).name
    samples = max(layer.points for layer in layers)
    groups = by_modality(layers)
    return Page(
        f"Intrinsic dimensions of {name}",
        command,
        f"The outputs of {len(layers)} layers were measured on {samples:,} samples.",
        [
            Tile(
                f"Mean ID, {group.modality}",
                f"{group.mean:.1f} ± {group.error:.1f}",
                f"{group.layers} layers, from {group.lowest:.1f} to {group.highest:.1f}",
            )
            for group in groups
        ]
        + [Tile("Model", name), Tile("Measured on", f"{samples:,} samples", facts.get("data", ""))],
        [],
        summary_of(profile),
        [
            step(
                "Let the dimensions decide how much each modality loses; --allocation id does it "
                "for any method.",
                *("prune", "--model", source.model, "--method", "omp", "--allocation", "id"),
                *("--sparsity", "0.5", "--id-profile", str(out / PROFILE)),
                *("--out", f"{out}-pruned"),
            )
        ],
        [
            Section("Intrinsic dimension by depth", charts=[dimension_by_depth(layers)]),
            part(modality_table(layers), "By modality"),
            part(layer_table(layers), f"All {len(layers)} layers", folded=True),
        ],
        facts,
    )
