"""report.html of a measurement: what it says in sentences, charts and tables, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlp_plugins.report.page import Table, check_can_render
from vlp_plugins.report.templates import template
from vlp_plugins.runtime.version import __version__


@dataclass(frozen=True)
class Chart:
    """A chart with a title and a sentence that says how to read it.

    Attributes:
        title: heading.
        svg: an `<svg>` element of ours; it stands in the page as it is.
        note: how to read it.
    """

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """What a measurement found, as the page shows it.

    Attributes:
        title: heading.
        command: the exact command that repeats it.
        sentences: the summary.
        charts: in order.
        tables: in order.
        long_tables: shown when somebody opens them.
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
    """The page as text; it loads nothing.

    Raises:
        UnsupportedError: if the packages of the extra `report` are missing.
    """
    check_can_render()
    from markupsafe import Markup

    charts = [
        {"title": chart.title, "note": chart.note, "svg": Markup(chart.svg)}
        for chart in findings.charts
    ]
    return template("findings.html.j2").render(
        title=findings.title, findings=findings, charts=charts, version=__version__
    )
