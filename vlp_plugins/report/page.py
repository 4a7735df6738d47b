"""report.html: a single file that needs neither a network nor other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.inspection import Inspection
from vlp_plugins.report.layers import collapse_warnings, layer_rows, sparsity_by_depth
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.runtime.version import __version__

if TYPE_CHECKING:
    from jinja2 import Template


def _template(name: str) -> Template:
    """A template of this package, which may extend and import the others."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(
            lambda wanted: files("vlp_plugins.report").joinpath(wanted).read_text(encoding="utf-8")
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _parameter_rows(masks: Mapping[str, Masks]) -> list[tuple[str, list[str]]]:
    """The parameters that the manifests record, one text per mask set; last, new weights."""
    recorded = [each.manifest.parameters for each in masks.values()]
    names = dict.fromkeys(name for parameters in recorded for name in parameters)
    rows = [
        (name, [value_text(each[name]) if name in each else "" for each in recorded])
        for name in names
    ]
    if any(each.new_values is not None for each in masks.values()):
        rows.append(("new weights", [_new_weights(each) for each in masks.values()]))
    return rows


def _new_weights(masks: Masks) -> str:
    if masks.new_values is None:
        return "none"
    return f"of the {masks.kept:,} kept elements, {text_of(masks.values_bytes)}"


def value_text(value: Any) -> str:
    """A value as text; lists of pairs, such as curves, as `a: b`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {value_text(inner)}" for name, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        pairs = value and all(_is_pair(each) for each in value)
        inner = (
            (f"{value_text(a)}: {value_text(b)}" for a, b in value)
            if pairs
            else map(value_text, value)
        )
        return ("; " if pairs else ", ").join(inner)
    return str(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


@dataclass(frozen=True)
class Table:
    """A table of text cells with a title and a sentence that says how to read it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart, an `<svg>` element, with a title and a sentence that says how to read it."""

    title: str
    svg: str
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
    """

    title: str
    command: str
    inspection: Inspection
    masks: Mapping[str, Masks]
    facts: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()


def render(title: str, runs: Sequence[Run], tables: Sequence[Table] = ()) -> str:
    """A page of pruned models as text: tables, then a section for each run.

    Raises:
        UnsupportedError: if the packages of the extra `report` are missing.
    """
    check_can_render()
    sections = []
    for run in runs:
        titles, masks = list(run.masks), list(run.masks.values())
        rows = layer_rows(run.inspection.weights, masks)
        sections.append(
            {
                "run": run,
                "titles": titles,
                "rows": rows,
                "modalities": _modalities(run.masks),
                "parameters": _parameter_rows(run.masks),
                "warnings": collapse_warnings(rows, titles, masks),
                "chart": sparsity_by_depth(rows, titles) if titles else "",
            }
        )
    return _template("page.html.j2").render(
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


@dataclass(frozen=True)
class Findings:
    """The results of a measurement as the page shows them.

    Attributes:
        title: heading.
        command: the exact command that repeats it.
        sentences: the summary.
        charts: in order.
        tables: in order.
        long_tables: folded; a click opens them.
        facts: short facts by name: data, time, memory.
    """

    title: str
    command: str
    sentences: Sequence[str]
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    long_tables: Sequence[Table] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def render_findings(findings: Findings) -> str:
    """A page of the results of a measurement as text.

    Raises:
        UnsupportedError: if the packages of the extra `report` are missing.
    """
    check_can_render()
    return _template("findings.html.j2").render(
        title=findings.title, findings=findings, version=__version__
    )
