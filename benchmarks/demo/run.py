"""The demo from end to end: data, both models, five methods, three sparsities, one report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo.build_data import build
from benchmarks.demo.compare import METHODS, SPARSITIES, Comparison, Subject, compare
from benchmarks.demo.own_files import replacing
from benchmarks.demo.processors import FAMILIES
from benchmarks.demo.table import page_of, results_table, text_of
from benchmarks.results import write_results
from vlp_plugins.report.page import render
from vlp_plugins.runtime.errors import UnsupportedError

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Settings:
    """What a run of the demo does.

    Attributes:
        models: folder with the trained models `blip` and `xvlm`.
        out: folder of results; those of an earlier run are replaced.
        pairs: unseen pairs to measure with.
        calibration: pairs that data-driven methods may read, in training handwriting.
        methods: registered names.
        sparsities: fractions removed.
    """

    models: Path = MODELS
    out: Path = Path("demo-out")
    pairs: int = 1000
    calibration: int = 512
    methods: Sequence[str] = METHODS
    sparsities: Sequence[float] = SPARSITIES


def run(settings: Settings, *, tell: Callable[[str], None] = print) -> Path:
    """Runs the demo; the path of `report.html`.

    `settings.out` then holds the data as image folders (`data/test`, `data/calibration`), a file
    of masks for every model, method and sparsity, `results.json` and `report.html`.

    Args:
        settings: what to do.
        tell: called with progress and with the tables.

    Raises:
        UnsupportedError: if a model is missing.
        OutputError: if the folder of results holds somebody else's files under our names.
    """
    sources = model_folders(settings.models)
    out = settings.out
    begin = time.perf_counter()
    names = ["data", *FAMILIES, "results.json", "report.html"]
    with replacing(out, names) as folder:
        data = folder / "data"
        build(data, calibration=settings.calibration, downstream=0, test=settings.pairs)
        tell(f"{settings.pairs:,} test and {settings.calibration:,} calibration pairs drawn")
        comparisons = []
        for source in sources:
            subject = Subject.load(source, data)
            found = compare(subject, settings.methods, settings.sparsities, tell=tell)
            _save_masks(found, folder / found.name)
            comparisons.append(found)
        tables = [results_table(found, settings.pairs) for found in comparisons]
        page = page_of(comparisons, tables, out / "data" / "calibration")
        (folder / "report.html").write_text(render(page), encoding="utf-8")
        figures = results_of(comparisons, settings, time.perf_counter() - begin)
        write_results("demo", figures, folder).rename(folder / "results.json")
    for table in tables:
        tell(f"\n{text_of(table)}\n")
    tell(f"{time.perf_counter() - begin:.0f} s in all")
    return out / "report.html"


def model_folders(models: Path) -> list[Path]:
    """The folders of the trained models.

    Raises:
        UnsupportedError: if one is missing; says how it is made.
    """
    for family in FAMILIES:
        if not (models / family / "config.json").is_file():
            raise UnsupportedError(
                f"there is no trained model at {models / family}; train one with "
                f"`python -m benchmarks.demo.train {family} --out {models / family} --minutes 60`, "
                "or say with --models-dir where the models are"
            )
    return [models / family for family in FAMILIES]


def mask_file(method: str, sparsity: float) -> str:
    """The name of a file of masks."""
    return f"{method}-{sparsity:g}.safetensors"


def results_of(
    comparisons: Sequence[Comparison], settings: Settings, seconds: float
) -> dict[str, Any]:
    """All figures, for JSON."""
    return {
        "pairs": settings.pairs,
        "calibration": settings.calibration,
        "seconds": round(seconds, 1),
        "models": {found.name: _model_results(found) for found in comparisons},
    }


def _model_results(found: Comparison) -> dict[str, Any]:
    return {
        "prunable": found.inspection.prunable,
        "structure": found.inspection.weights.structure,
        "dense": found.dense.as_dict(),
        "pruned": [
            {
                "method": outcome.method,
                "sparsity": outcome.sparsity,
                **outcome.figures.as_dict(),
                "removed": outcome.masks.removed,
                "sparsity_by_modality": {
                    name: count.sparsity
                    for name, count in outcome.masks.counts().by_modality.items()
                },
            }
            for outcome in found.outcomes
        ],
        "pruning_seconds": {name: round(s, 2) for name, s in found.pruning_seconds.items()},
        "seconds": round(found.seconds, 1),
    }


def _save_masks(found: Comparison, folder: Path) -> None:
    for outcome in found.outcomes:
        outcome.masks.save(folder / mask_file(outcome.method, outcome.sparsity))
