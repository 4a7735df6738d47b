"""Table 7: runtimes of the data-driven methods, as ratios to MULTIFLOW in one run, at full size.

Every method reads the same 12 batches of 4 pairs, iterative ones in 4 rounds of 3 (the paper: 3,000
batches, 60 rounds of 50; 500 batches for CHITA). A method is a process and a file, one at a time
with all cores and nothing beside it; it takes minutes, not the 90 seconds of other cells.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.papers import kept
from benchmarks.papers.layout import markdown
from benchmarks.papers.plots import colour, draw_bars, panels, svg_of
from benchmarks.papers.runtimes import BATCHES, METHODS, PAIRS, SPARSITY, Runtime
from vlp_plugins.runtime.files import write_text
from vlp_plugins.runtime.memory import text_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Runtimes of the data-driven methods beside MULTIFLOW (Table 7)"
MODELS = ("blip", "xvlm")
TITLES = {"blip": "BLIP base", "xvlm": "X-VLM base"}
PAPER: Mapping[str, Mapping[str, float]] = {
    "blip": {
        "multiflow": 981.45,
        "snip": 2770.61,
        "itersnip": 2963.97,
        "chita": 8351.92,
        "chita++": 40538.03,
    },
    "xvlm": {
        "multiflow": 690.64,
        "snip": 1847.04,
        "itersnip": 1966.03,
        "chita": 3879.94,
        "chita++": 28368.73,
    },
}
"""Seconds, Table 7 of the paper."""
Content = Mapping[str, Any]
BUSY = 0.5  # of the load average; beyond, somebody else is computing


def in_paper(model: str, method: str) -> float:
    """The ratio of the paper."""
    return PAPER[model][method] / PAPER[model]["multiflow"]


def runtimes(options: argparse.Namespace) -> list[Runtime]:
    """What the command line asks for."""
    models = options.models or MODELS[:1]
    return [Runtime(model, method) for model in models for method in options.methods or METHODS]


def run(options: argparse.Namespace) -> int:
    """Does what the command line says; returns how many methods failed."""
    asked = runtimes(options)
    if options.list:
        if options.tables:
            print("\n".join(kept.listed(asked, options.cells)))
        else:
            print(kept.counted("table7", asked, options.cells))
        return 0
    if options.render:
        print(render(options.cells, options.cells.parent))
        return 0
    missing = [each for each in asked if each.content(options.cells) is None]
    print(f"table7: {len(asked) - len(missing)} cells are there, {len(missing)} to run", flush=True)
    limit = float("inf") if options.minutes is None else 60 * options.minutes
    return len(measured(missing, options.cells, limit))


def measured(missing: Sequence[Runtime], out: Path, limit: float = float("inf")) -> list[Runtime]:
    """Measures one after the other, each in a new process; returns those that failed.

    Args:
        missing: in order.
        out: folder of the cells' files.
        limit: seconds after which no further one is begun.
    """
    if missing and (load := os.getloadavg()[0]) > BUSY:
        print(f"the machine is busy (load {load:.1f}): the ratios will be rough", flush=True)
    context = multiprocessing.get_context("spawn")
    failed = []
    begin = time.monotonic()
    for each in missing:
        if time.monotonic() - begin > limit:
            break
        start = time.monotonic()
        process = context.Process(target=each.run, args=(out,))
        process.start()
        try:
            process.join()
        finally:
            process.terminate()
        content = each.content(out) if process.exitcode == 0 else None
        if content is None:
            failed.append(each)
        said = f"ratio {content['ratio']:.2f}" if content else "FAILED"
        print(f"{each.name}: {said}, {time.monotonic() - start:.0f} s in all", flush=True)
    return failed


def render(cells: Path, out: Path) -> str:
    """Writes `table7.md` and `table7.svg` of what there is, and returns the Markdown."""
    found = {
        model: {method: Runtime(model, method).content(cells) for method in METHODS}
        for model in MODELS
    }
    there = {model: rows for model, rows in found.items() if any(rows.values())}
    lines = [f"# {TITLE}", "", *_COMMANDS, "", _PREFACE]
    if there:
        write_text(out / "table7.svg", svg_of(plot(there)), overwrite=True)
        lines += ["", f"![{TITLE}](table7.svg)"]
    for model, rows in (there or {MODELS[0]: found[MODELS[0]]}).items():
        lines += ["", f"## {TITLES[model]}", "", *table(model, rows)]
    text = "\n".join(lines) + "\n"
    write_text(out / "table7.md", text, overwrite=True)
    return text


_COMMANDS = (
    "    python -m benchmarks.papers table7 --render   # writes this page",
    "    python -m benchmarks.papers table7            # measures the methods that are missing",
)
_HEADER = (
    "Method",
    "Ratio",
    "Paper",
    "Seconds",
    "In batches",
    "The rest",
    "MULTIFLOW before / after",
    "Peak memory",
    "Above start",
    "Rows in",
    "Threads",
    "Others",
)
_PREFACE = (
    f"Seconds of pruning to {SPARSITY:.0%} with {BATCHES} batches of {PAIRS} pairs at 224 px, "
    "float32, random weights, noise for data; iterative methods in 4 rounds of 3 batches; lambda "
    "of CHITA given (default effort, blocks of 2,000). Every method ran in a process of its own "
    "that measured MULTIFLOW right before "
    "and right after it: the ratio is to the mean of the two. Batches: forward, backward, and "
    "keeping what comes of them; the rest: scores, masks, or the solver. Others: cores that other "
    "processes used meanwhile; the ratios are rough if it is not near 0. The paper's figures are "
    "of one A100, 3,000 batches (60 rounds of 50), for CHITA 500."
)


def table(model: str, rows: Mapping[str, Content | None]) -> list[str]:
    """A line per method; what is missing says so."""
    return markdown(_HEADER, [_cells(model, method, row) for method, row in rows.items()])


def _cells(model: str, method: str, row: Content | None) -> list[str]:
    published = f"{in_paper(model, method):.2f}"
    if row is None:
        return [method, "-", published, *[""] * (len(_HEADER) - 3)]
    own, (before, after) = row["measured"], row["multiflow"]
    return [
        method,
        f"{row['ratio']:.2f}",
        published,
        f"{own['seconds']:.1f}",
        f"{own['data']:.1f}",
        f"{own['rest']:.1f}",
        f"{before['seconds']:.1f} / {after['seconds']:.1f}",
        text_of(own["peak_bytes"]),
        text_of(own["extra_peak_bytes"]),
        row["rows_kept_in"] or "",
        str(row["machine"]["threads"]),
        "" if row["others"] is None else f"{row['others']:.2f}",
    ]


def plot(found: Mapping[str, Mapping[str, Content | None]]) -> Figure:
    """Bars of the ratios, here and in the paper, a panel per model."""

    def draw(axis: Axes, _: int, j: int) -> None:
        model, rows = list(found.items())[j]
        bars: dict[str, list[float | None]] = {
            "here": [row["ratio"] if row else None for row in rows.values()],
            "paper": [in_paper(model, method) for method in rows],
        }
        draw_bars(axis, list(rows), bars, [colour(0), colour(1)])
        axis.set_yscale("log")
        axis.set_ylabel("time / time of MULTIFLOW", fontsize=8)

    return panels([""], [TITLES[model] for model in found], draw)
