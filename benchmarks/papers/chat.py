"""Table chat: does pruning block by block help a chat model, do token selections, do budgets?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.papers import kept
from benchmarks.papers.chat_cells import (
    BATCH,
    CAPTIONS,
    NO_DATA,
    PATTERN,
    POOL,
    QUESTIONS,
    SAMPLES,
    SEEDS,
    WALKING,
    WAYS,
    Bench,
    Cell,
    Measurable,
    cells,
)
from benchmarks.papers.layout import bold, markdown
from benchmarks.papers.ways import Way
from vlp_plugins.runtime.files import write_text

BY_WALK = [
    ("-".join(filter(None, (*each, "blocks"))), "-".join(filter(None, (*each, "model"))))
    for each in WALKING
]
BY_TOKENS = [
    *((f"{method}-blocks-{kind}", f"{method}-blocks")
      for method in ("wanda", "alps") for kind in ("text", "image")),
    *((way, "wanda-blocks") for way in ("atv", "wanda-blocks-amia", "tamp")),
    ("alps-blocks-atv", "alps-blocks"),
]  # fmt: skip
BY_BUDGETS = [
    *((f"{m}-owl-{w}", f"{m}-{w}") for m in ("wanda", "alps") for w in ("model", "blocks")),
    *((f"{method}-das-blocks", f"{method}-blocks") for method in ("wanda", "alps")),
]
ALPS, MULTIFLOW = "alps-model", "multiflow-model"
"""What `docs/choosing.md` recommends where weights may change, and where they must not."""
_OTHERS = ("chita-blocks", "chita-model", "sparsegpt-model", "alps+-model", "refit-model", "lamp")
BY_METHOD = [(way, ALPS) for way in _OTHERS]
MASKS_ALONE = ("omp", "lamp", "wanda", "multiflow", "atv", "tamp")
"""Methods that leave the weights that stay as they are."""

Values = NDArray[np.float64]
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Comparison:
    """A table of models that are pruned in one shot, and measured without fine-tuning.

    Attributes:
        name: on the command line, and of the page.
        title: of the page.
        preface: what was done.
        measures: by name in the cells' files what a column calls it; `losses` is one of them.
        sections: titles, the differences below each, and whether their mean is shown.
        models: by name of the demo model its title; a page of several has a part for each.
        cells: those of some seeds, in the order in which they are run.
        bench: the data, made below a folder, and the model of a name.
        ways: one of them is chosen.
        seeds: those of the table.
    """

    name: str
    title: str
    preface: str
    measures: Mapping[str, str]
    sections: Sequence[tuple[str, Pairs, bool]]
    models: Mapping[str, str]
    cells: Callable[[Sequence[int]], Sequence[Cell]]
    bench: Callable[[Path, str], Measurable]
    ways: Sequence[Way]
    seeds: Sequence[int] = SEEDS

    def run(self, options: argparse.Namespace) -> int:
        """Does what the command line says; returns 0, since a cell that fails stops the run."""
        asked = self.cells(options.seeds or self.seeds)
        if options.list:
            named = options.tables
            lines = kept.listed(asked, options.cells) if named else []
            print("\n".join(lines) if named else kept.counted(self.name, asked, options.cells))
            return 0
        if options.render:
            text = self.page(asked, options.cells)
            write_text(options.cells.parent / f"{self.name}.md", text, overwrite=True)
            print(text)
            return 0
        missing = [cell for cell in asked if cell.content(options.cells) is None]
        there = len(asked) - len(missing)
        print(f"{self.name}: {there} cells are there, {len(missing)} to run", flush=True)
        begin = time.monotonic()
        limit = float("inf") if options.minutes is None else 60 * options.minutes
        torch.set_num_threads(1)
        benches: dict[str, Measurable] = {}
        for number, cell in enumerate(missing, 1):
            start = time.monotonic()
            if start - begin > limit:
                break
            if cell.model not in benches:
                benches[cell.model] = self.bench(options.world, cell.model)
            cell.run(benches[cell.model], options.cells)
            took = time.monotonic() - start
            print(f"{cell.name}: {took:.0f} s; {len(missing) - number} left", flush=True)
        return 0

    def page(self, asked: Sequence[Cell], out: Path) -> str:
        """The Markdown of what there is."""
        parts = {
            title: Found(its, out, self.measures)
            for model, title in self.models.items()
            if (its := [cell for cell in asked if cell.model == model])
        }
        there = sum(len(found.contents) for found in parts.values())
        lines = [
            f"# {self.title}",
            "",
            f"    python -m benchmarks.papers {self.name} --render   # writes this page",
            f"    python -m benchmarks.papers {self.name}            # runs the missing cells",
            "",
            f"{self.preface} {_counted(parts.values(), self.sections)}",
            "",
        ]
        if missing := len(asked) - there:
            lines += [f"**{missing} of {len(asked)} cells are missing**: `-`, or fewer seeds.", ""]
        for title, found in parts.items():
            lines += self._part(found, f"{title}: " if len(self.models) > 1 else "")
        return "\n".join(lines).rstrip() + "\n"

    def _part(self, found: Found, name: str) -> list[str]:
        """The page of one model; `name` begins its headings."""
        heading = _headings(name)
        lines = [heading("The test split"), "", *_figures(found), ""]
        if found.refused:
            lines += ["Without figures:", "", *found.refused, ""]
        for title, pairs, pooled in self.sections:
            if rows := _gains(found, pairs, pooled=pooled):
                lines += [heading(title), "", *rows, ""]
        names = [way.name for way in self.ways]
        alone = [way.name for way in self.ways if way.method in MASKS_ALONE]
        lines += [heading("Chosen on the development split"), "", *_chosen(found, names, ALPS)]
        if chosen := _chosen(found, alone, MULTIFLOW):
            lines += ["", "Of the methods that leave the weights that stay as they are:", ""]
            lines += [*chosen, ""]
        return lines


@dataclass(frozen=True)
class Figure:
    """A mean, with its standard error over test samples, and over seeds if there are several."""

    mean: float
    of_samples: float
    of_seeds: float | None

    @classmethod
    def of(cls, by_seed: Mapping[int, Values]) -> Figure | None:
        """Of the values of each sample, by seed; None if there are none."""
        if not by_seed:
            return None
        values = np.stack(list(by_seed.values()))
        seeds, samples = values.shape
        spread = values.mean(1).std(ddof=1) / seeds**0.5 if seeds > 1 else None
        of_samples = values.mean(0).std(ddof=1) / samples**0.5
        return cls(float(values.mean()), float(of_samples), spread and float(spread))

    @property
    def beyond(self) -> bool:
        """Whether it is more than two standard errors, of samples and seeds, away from 0."""
        return abs(self.mean) > 2 * float(np.hypot(self.of_samples, self.of_seeds or 0.0))

    def text(self, measure: str, sign: str = "") -> str:
        """Percent, or nats with three digits."""
        factor, digits = (1, 3) if measure == "losses" else (100, 1)
        errors = (self.of_samples, *(() if self.of_seeds is None else (self.of_seeds,)))
        said = " ".join(f"±{factor * each:.{digits}f}" for each in errors)
        return f"{factor * self.mean:{sign}.{digits}f} {said}"


class Found:
    """What the files of the cells of a model say."""

    def __init__(self, asked: Sequence[Cell], out: Path, measures: Mapping[str, str]) -> None:
        self.asked = asked
        self.measures = measures
        self.seeds = sorted({cell.seed for cell in asked})
        self.contents = {
            (cell.way and cell.way.name, cell.sparsity, cell.seed): content
            for cell in asked
            if (content := cell.content(out)) is not None
        }

    @property
    def refused(self) -> list[str]:
        """A line for each way and pattern or sparsities that have no figures, with the reason."""
        reasons: dict[tuple[str | None, str], dict[str, None]] = {}
        for (way, sparsity, _), content in self.contents.items():
            if why := content.get("refused"):
                name = way if isinstance(way, str) else None
                reasons.setdefault((name, why), {})[_title(sparsity)] = None
        return [f"- `{way}` ({', '.join(at)}): {why}." for (way, why), at in reasons.items()]

    def of(self, way: str | None, sparsity: float | str) -> dict[int, Mapping[str, Any]]:
        """The contents by seed; what reads no data is the same for each."""
        if way in (None, *NO_DATA):
            key = (way, 0.0 if way is None else sparsity, self.seeds[0])
            keys = dict.fromkeys(self.seeds, key)
        else:
            keys = {seed: (way, sparsity, seed) for seed in self.seeds}
        found = {seed: self.contents.get(key) for seed, key in keys.items()}
        return {seed: each for seed, each in found.items() if each and "refused" not in each}

    def values(self, way: str | None, sparsity: float | str, measure: str) -> dict[int, Values]:
        """By seed what was measured of each sample of the test."""
        found = self.of(way, sparsity)
        return {seed: np.array(content["test"][measure], float) for seed, content in found.items()}

    def gains(self, way: str, base: str, sparsity: float | str, measure: str) -> dict[int, Values]:
        """By seed that both have the differences of each sample."""
        mine, its = (self.values(each, sparsity, measure) for each in (way, base))
        return {seed: mine[seed] - its[seed] for seed in mine.keys() & its.keys()}


ERRORS = (
    "The first ± is one standard error over these {samples}, the second, where there are several "
    "seeds, one over seeds. A difference is taken one by one and seed by seed; bold is one beyond "
    "two standard errors, of both together: of 20 differences that are none one is."
)
CHAT = Comparison(
    "chat",
    "A chat model: walks, tokens and solvers",
    "The demo's LLaVA (`benchmarks/demo/models/chat`), pruned in one shot and not fine-tuned. "
    f"Calibration: {SAMPLES} samples in batches of {BATCH}, half of them captions, half questions "
    f"about other scenes, drawn for each seed from {POOL} of either. Measured on {QUESTIONS} "
    "scenes with handwriting and combinations that training never showed: answers that are right, "
    f"captions of the first {CAPTIONS} that name exactly what is there (%), and the cross-entropy "
    f"of the answers (nats per token). {ERRORS.format(samples='scenes')} "
    "`lamp` and `chita-model` are global, and `lamp` reads no data; `multiflow` prunes each "
    "modality, `alps`, `alps+`, `chita-blocks` and `sparsegpt` each layer, the others each row "
    f"equally. `{PATTERN}` leaves no budgets, so `tamp` is its token selection alone there.",
    {"captions": "Captions right", "answers": "Answers right", "losses": "Answer loss"},
    (
        ("Block by block, minus the whole-model pass", BY_WALK, True),
        ("Token selections, minus all tokens in the same walk", BY_TOKENS, False),
        ("Budgets of blocks, minus the same sparsity in every layer or row", BY_BUDGETS, False),
        ("Other methods, minus ALPS", BY_METHOD, False),
    ),
    {"chat": "LLaVA"},
    cells,
    Bench.of,
    WAYS,
)


def _headings(name: str) -> Callable[[str], str]:
    """Second-level headings; a name before the title takes its capital."""
    return lambda title: f"## {name}{title[0].lower() + title[1:] if name else title}"


def _counted(parts: Iterable[Found], sections: Sequence[tuple[str, Pairs, bool]]) -> str:
    """How many differences the sections have, and how many are bold, without means of several."""
    found = [
        figure.beyond
        for each in parts
        for way, base in dict.fromkeys(pair for _, pairs, _ in sections for pair in pairs)
        for sparsity in _ordered(each)
        for measure in each.measures
        if (figure := Figure.of(each.gains(way, base, sparsity, measure))) is not None
    ]
    return f"Of {len(found)} differences of two methods {sum(found)} are bold."


def _title(sparsity: float | str) -> str:
    return "2:4" if sparsity == PATTERN else f"{sparsity:.0%}"


def _ordered(found: Found) -> list[float | str]:
    there = {sparsity for _, sparsity, _ in found.contents}
    return [sparsity for sparsity in (0.5, PATTERN, 0.6, 0.7) if sparsity in there]


def _figures(found: Found) -> list[str]:
    """Rows of `_row`; the dense model first."""
    names = [cell.way.name for cell in found.asked if cell.way is not None]
    rows = [_row(found, None, 0.0, "")]
    for sparsity in _ordered(found):
        rows += [
            _row(found, name, sparsity, _title(sparsity))
            for name in dict.fromkeys(names)
            if any((c.way and c.way.name, c.sparsity) == (name, sparsity) for c in found.asked)
        ]
    return markdown(["Sparsity", "Method", *found.measures.values(), "Seeds"], rows)


def _row(found: Found, way: str | None, sparsity: float | str, title: str) -> list[str]:
    fixed = way in (None, *NO_DATA)
    texts = []
    for measure in found.measures:
        by_seed = found.values(way, sparsity, measure)
        figure = Figure.of(dict(list(by_seed.items())[:1]) if fixed else by_seed)
        texts.append(figure.text(measure) if figure else "-")
    return [title, way or "dense", *texts, "any" if fixed else str(len(found.of(way, sparsity)))]


def _gains(found: Found, pairs: Pairs, *, pooled: bool) -> list[str]:
    """A row for each pair and sparsity; `pooled`: also one of the mean over pairs."""
    measures = found.measures
    rows = []
    for sparsity in _ordered(found):
        gains = {
            f"{way} - {base}": {m: found.gains(way, base, sparsity, m) for m in measures}
            for way, base in pairs
        }
        there = {name: each for name, each in gains.items() if each["losses"]}
        if pooled and there:
            seeds = set.intersection(*(set(each["losses"]) for each in there.values()))
            there["mean of these"] = {
                m: {s: np.mean([each[m][s] for each in there.values()], axis=0) for s in seeds}
                for m in measures
            }
        for name, each in there.items():
            figures = {m: Figure.of(by_seed) for m, by_seed in each.items()}
            texts = [_gain(m, figure) for m, figure in figures.items()]
            rows.append([_title(sparsity), name, *texts, str(len(each["losses"]))])
    return markdown(["Sparsity", "Method", *found.measures.values(), "Seeds"], rows)


def _gain(measure: str, figure: Figure | None) -> str:
    if figure is None:
        return "-"
    text = figure.text(measure, "+")
    return bold(text) if figure.beyond else text


def _chosen(found: Found, names: Sequence[str], usual: str) -> list[str]:
    """The order on the development split, and the first of it against `usual` on the test."""
    levels = [sparsity for sparsity in _ordered(found) if sparsity != PATTERN]
    cells = [(sparsity, seed) for sparsity in levels for seed in found.of(usual, sparsity)]
    names = [name for name in names if all(seed in found.of(name, at) for at, seed in cells)]
    if not cells or len(names) < 2:
        return []
    dev = {
        name: {
            m: float(np.mean([found.of(name, at)[seed]["dev"][m] for at, seed in cells]))
            for m in found.measures
        }
        for name in names
    }
    order = sorted(names, key=lambda name: dev[name]["losses"])
    rows = [
        [name, *(f"{v:.3f}" if m == "losses" else f"{100 * v:.1f}" for m, v in each.items())]
        for name in order
        for each in [dev[name]]
    ]
    where = ", ".join(f"{_title(at)} seed {seed}" for at, seed in cells)
    first = next(name for name in order if name != usual)
    return [
        f"By the loss, mean over the cells that all of these have ({where}):",
        "",
        *markdown(["Method", *found.measures.values()], rows),
        "",
        f"First is `{order[0]}`. `{first}` on the test split, minus the usual `{usual}`:",
        "",
        *_gains(found, [(first, usual)], pooled=False),
    ]
