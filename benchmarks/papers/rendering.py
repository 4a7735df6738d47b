"""A table's page and its plot from the files of its cells.

What a page says before its figures: the command, the settings, chance, and what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.papers.catalogue import Table
from benchmarks.papers.comparing import SEED_SPREAD, standard_error
from benchmarks.papers.findings import Found
from benchmarks.papers.layout import title_of
from benchmarks.papers.measures import FAILED_BELOW
from benchmarks.papers.plots import svg_of
from benchmarks.papers.tuning import LONGER, LONGER_STEPS, Tuning, part_of
from benchmarks.papers.views import Rendered, whole
from benchmarks.papers.ways import Way
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.runtime.files import write_text
from vlp_plugins.scoring.factors import GUIDED

_PAPER = (
    "The papers fine-tune models a hundred times as large in batches of 128 or 256 for 5 to 10 "
    "epochs, at 1e-5 to 5e-5, and calibrate with 500 or 3,000 batches."
)
_PAPER_VISION = (
    "The paper fine-tunes a DINO ViT in batches of 32 for 10 epochs, at 1e-5, and calibrates with "
    "128 or 64,000 images."
)
_SEVERAL = " (a figure is their mean ± standard deviation)."
_SEEDS = {
    1: ".",
    2: " (a figure is their mean ± standard deviation, which two seeds hardly tell: what is pooled "
    "over methods, by `python -m benchmarks.papers.levels`, says more).",
}


def render(table: Table, seeds: Sequence[int] | None, cells: Path, out: Path) -> str:
    """Writes `NAME.md` and `NAME.svg` and returns the Markdown.

    Args:
        table: its own view, or `whole`.
        seeds: over which figures are means; None: those of the table.
        cells: folder of the cells' files.
        out: folder to write to.
    """
    found = Found(table.of(seeds), cells)
    rendered = (table.view or whole)(found)
    if rendered.figure is None:
        (out / f"{table.name}.svg").unlink(missing_ok=True)  # of another time
    else:
        write_text(out / f"{table.name}.svg", svg_of(rendered.figure), overwrite=True)
    text = page(table, found, rendered)
    write_text(out / f"{table.name}.md", text, overwrite=True)
    return text


def page(table: Table, found: Found, rendered: Rendered) -> str:
    """The Markdown: what was done, what is missing, then the figures."""
    lines = [f"# {table.title}", "", *commands(table, found), ""]
    if found.cells:
        for paragraph in (settings(found), *chance(found), missing(found)):
            lines += [paragraph, ""]
    if rendered.figure is not None:
        lines += [f"![{table.title}]({table.name}.svg)", ""]
    return "\n".join([*lines, *rendered.lines]).rstrip() + "\n"


def commands(table: Table, found: Found) -> list[str]:
    """Those that run the cells and write the page."""
    usual = found.seeds in ([], [*table.seeds])
    seeds = "" if usual else f" --seeds {' '.join(map(str, found.seeds))}"
    where = " --world FILE.yaml --cells FOLDER" if found.origins else ""
    command = f"    python -m benchmarks.papers {table.name}{seeds}{where}"
    return [f"{command} --render  # writes this page", f"{command}  # runs the missing cells"]


def settings(found: Found) -> str:
    """One paragraph: what is scaled down, and how far."""
    parts = [f"{title_of(model)}: {_tunings(found, model)}" for model in found.models]
    own = found.origins
    which = [f"{title_of(model)} is {origin.checkpoint}." for model, origin in own.items()]
    first = "Models" if own else "Scaled down: small models"
    paper = [] if own else [_PAPER_VISION if found.models == ["vit"] else _PAPER]
    return " ".join(
        [
            f"{first} are pruned once, and fine-tuned on each task with the zeros kept, one recipe "
            f"for every method (AdamW, bfloat16 autocast). {'. '.join(parts)}.",
            *which,
            _calibration(found.ways.values()),
            f"Seeds: {', '.join(map(str, found.seeds))}" + _SEEDS.get(len(found.seeds), _SEVERAL),
            *paper,
        ]
    )


def chance(found: Found) -> list[str]:
    """What R@1 is by chance, how far it is off, and what ERR means; nothing without retrieval."""
    if "retrieval" not in found.tasks:
        return []
    terms = (
        "Text R@1: a text found for an image; Image R@1: an image for a text. Re-ranked: the "
        "matching head orders the best candidates; features: it does not. "
        f"ERR: average R@1 by features below {FAILED_BELOW}%."
    )
    queries = {queries for model in found.models if (queries := found.queries(model))}
    if not queries or found.origins:  # how far others' figures are off, nobody has measured
        return [terms]
    fewest = min(queries)
    errors = ", ".join(f"{standard_error(at, fewest):.1f} at {at}%" for at in (5, 20, 50))
    return [
        f"R@1 of a model that guesses is {100 / fewest:.1f}% (1 of {fewest} images, each with its "
        "first caption). One standard "
        f"error over {fewest} queries is about {errors}, in points; another seed changes an "
        f"average by {SEED_SPREAD:g} points (standard deviation). A difference of two methods is "
        "off by 1.4 times both. The matching head learns slowly, so that features alone may be "
        f"ahead. {_unconverged(found)}{terms}"
    ]


def _unconverged(found: Found) -> str:
    """That longer fine-tuning changes the figures, where a table does not show it itself."""
    steps = {t.steps for model in found.models if (t := found.tuning(model, "retrieval"))}
    if found.split != "test" or LONGER in found.tasks:
        return ""
    return (
        f"{max(steps)} steps of fine-tuning have not converged: after {LONGER_STEPS} figures, what "
        "is left of the dense model's, and what re-ranking does are others ([longer](longer.md)). "
    )


def missing(found: Found) -> str:
    """How many cells there are, and which are not."""
    total, absent = len(found.cells), found.missing
    if not absent:
        return f"All {total} cells are there."
    groups = Counter(f"{title_of(cell.model)} {title_of(cell.task)}" for cell in absent)
    named = ", ".join(f"{name} {count}" for name, count in groups.items())
    return (
        f"**{len(absent)} of {total} cells are missing** ({named}): `-` below. Bold and order are "
        "among those that are there."
    )


def _tunings(found: Found, model: str) -> str:
    small = not found.origins
    there = [
        (task, tuning) for task in found.tasks if (tuning := found.tuning(model, task)) is not None
    ]
    return (
        "; ".join(
            f"{title_of(task)} {_tuning(tuning, part_of(tuning, found.split, small=small))}"
            for task, tuning in there
        )
        or "-"
    )


def _tuning(tuning: Tuning, split: str) -> str:
    length = f"{tuning.steps} steps" if tuning.steps else f"{tuning.epochs} epochs"
    text = f"{length} of {tuning.batch_size} at {tuning.learning_rate:g}"
    text += f", measured on {tuning.measured or 'all'} of {split}"
    return f"{text}, {tuning.rerank} candidates re-ranked" if tuning.rerank else text


def _calibration(ways: Iterable[Way]) -> str:
    groups: dict[str, list[str]] = {}
    for way in ways:
        said = _seen(way) if reads_data(way) else "none"
        groups.setdefault(said, []).append(way.name)
    parts = [f"{said} ({', '.join(names)})" for said, names in groups.items()]
    return f"Calibration samples: {'; '.join(parts)}." if parts else ""


def _seen(way: Way) -> str:
    steps = way.parameters.get("steps")
    text = f"{way.samples:,} in batches of {way.batch_size}" + (f", {steps} steps" if steps else "")
    if not way.dimensions:
        return text
    dimensions = f"{way.dimensions:,} for dimensions"
    name = way.method.removeprefix(GUIDED)
    return f"{text}, {dimensions}" if make_method(registry(), name).reads_data else dimensions


def reads_data(way: Way) -> bool:
    """Whether its method, or what divides its budget, looks at calibration samples."""
    if way.options.get("allocation") == "id" or way.method not in registry().method_names():
        return True
    return make_method(registry(), way.method).reads_data
