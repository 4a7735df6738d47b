"""report.html: one file that can be mailed, opened offline and read on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.inspection import Inspection
from vlp_plugins.report.charts import sparsity_by_depth
from vlp_plugins.report.layers import collapse_warnings, layer_rows
from vlp_plugins.report.parameters import parameter_rows
from vlp_plugins.report.templates import template
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.version import __version__


@dataclass(frozen=True)
class Table:
    """A table of text cells with a title and a sentence that says how to read it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One pruned model as the page shows it.

    Attributes:
        title: heading.
        command: the exact command that repeats it.
        inspection: what the model is to the pruner.
        masks: mask sets by title (`75%`).
        facts: short facts by name: timing, memory, data.
        tables: further tables: metrics before and after, agreement of the halves of the data.
        warnings: sentences beside the collapse warnings, which the page finds itself.
    """

    title: str
    command: str
    inspection: Inspection
    masks: Mapping[str, Masks]
    facts: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    warnings: Sequence[str] = ()


def render(title: str, runs: Sequence[Run], tables: Sequence[Table] = ()) -> str:
    """The page as text.

    Args:
        title: heading of the page.
        runs: one section each.
        tables: shown above the sections.

    Raises:
        UnsupportedError: if the packages of the extra `report` are missing.
    """
    check_can_render()
    from markupsafe import Markup

    sections = []
    for run in runs:
        titles = list(run.masks)
        rows = layer_rows(run.inspection.weights, list(run.masks.values()))
        sections.append(
            {
                "run": run,
                "titles": titles,
                "rows": rows,
                "modalities": _modalities(run.masks),
                "parameters": parameter_rows(run.masks),
                "warnings": [
                    *run.warnings,
                    *collapse_warnings(rows, titles, list(run.masks.values())),
                ],
                "chart": Markup(sparsity_by_depth(rows, titles)) if titles else "",
            }
        )
    return template("page.html.j2").render(
        title=title, sections=sections, tables=tables, version=__version__
    )


def check_can_render() -> None:
    """Raises `UnsupportedError` if the packages of the extra `report` are missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "report.html is left out: it needs jinja2 and matplotlib "
            "(pip install 'vlp-plugins[report]')"
        ) from error


def _modalities(masks: Mapping[str, Masks]) -> list[tuple[str, list[str]]]:
    """For every modality and the whole: kept elements and sparsity in each mask set."""
    rows: dict[str, list[str]] = {}
    for each in masks.values():
        counts = each.counts()
        for name, count in [*counts.by_modality.items(), ("all", counts.all)]:
            rows.setdefault(name, []).append(f"{count.sparsity:.4%} ({count.kept:,} kept)")
    return list(rows.items())
