"""What became of every plug-in: the text of `vlp plugins`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vlp_plugins.plugins.offers import Kind


@dataclass(frozen=True)
class PluginReport:
    """One plug-in.

    Attributes:
        name: entry-point name, `distribution:name` if an earlier distribution has it already.
        distribution: normalised name of the distribution.
        version: version of the distribution.
        registered: by kind the names that can be used; empty if it failed or is blocked.
        error: why nothing of it is registered, on one line; None if it is.
        notes: names that clash.
        blocked: left out, and not even imported, by the wish of the user.
    """

    name: str
    distribution: str
    version: str
    registered: Mapping[Kind, tuple[str, ...]] = field(default_factory=dict)
    error: str | None = None
    notes: tuple[str, ...] = ()
    blocked: bool = False

    @property
    def status(self) -> str:
        """`ok`, `failed` or `blocked`."""
        return "blocked" if self.blocked else "failed" if self.error else "ok"


def plugins_table(reports: Iterable[PluginReport]) -> list[dict[str, str]]:
    """One row per plug-in.

    Args:
        reports: of `Registry.plugins()`.

    Returns:
        Rows with the columns `plug-in`, `distribution`, `version`, `status`, `registered`
        (`scorers: a, b; adapters: c`) and `notes` (why it failed, or clashes).
    """
    return [
        {
            "plug-in": report.name,
            "distribution": report.distribution,
            "version": report.version,
            "status": report.status,
            "registered": "; ".join(
                f"{kind}: {', '.join(names)}" for kind, names in report.registered.items() if names
            ),
            "notes": report.error or "; ".join(report.notes),
        }
        for report in reports
    ]
