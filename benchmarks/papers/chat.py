"""Table chat: does pruning block by block help a chat model, do token selections, do budgets?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
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
    PATTERN,
    POOL,
    QUESTIONS,
    SAMPLES,
    SEEDS,
    WALKING,
    WAYS,
    Bench,
    Cell,
    cells,
)
from benchmarks.papers.layout import bold, markdown
from vlp_plugins.runtime.files import write_text

TITLE = "A chat model: walks, tokens and solvers"
MEASURES = {"captions": "Captions right", "answers": "Answers right", "losses": "Answer loss"}
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
USUAL = "alps-model"
"""What `docs/choosing.md` recommends where weights may change."""
BY_METHOD = [
    (way, USUAL)
    for way in ("chita-blocks", "sparsegpt-model", "alps+-model", "refit-model", "lamp")
]

Values = NDArray[np.float64]


def run(options: argparse.Namespace) -> int:
    """Does what the command line says; returns 0, since a cell that fails stops the run."""
    asked = cells(options.seeds or SEEDS)
    if options.list:
        named = options.tables
        lines = kept.listed(asked, options.cells) if named else []
        print("\n".join(lines) if named else kept.counted("chat", asked, options.cells))
        return 0
    if options.render:
        text = page(Found(asked, options.cells))
        write_text(options.cells.parent / "chat.md", text, overwrite=True)
        print(text)
        return 0
    missing = [cell for cell in asked if cell.content(options.cells) is None]
    print(f"chat: {len(asked) - len(missing)} cells are there, {len(missing)} to run", flush=True)
    begin = time.monotonic()
    limit = float("inf") if options.minutes is None else 60 * options.minutes
    torch.set_num_threads(1)
    bench = Bench.of(options.world) if missing else None
    for number, cell in enumerate(missing, 1):
        if time.monotonic() - begin > limit:
            break
        assert bench is not None
        start = time.monotonic()
        cell.run(bench, options.cells)
        took = time.monotonic() - start
        print(f"{cell.name}: {took:.0f} s; {len(missing) - number} left", flush=True)
    return 0


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
    """What the files of the cells say."""

    def __init__(self, asked: Sequence[Cell], out: Path) -> None:
        self.asked = asked
        self.seeds = sorted({cell.seed for cell in asked})
        self.contents = {
            (cell.way and cell.way.name, cell.sparsity, cell.seed): content
            for cell in asked
            if (content := cell.content(out)) is not None
        }

    def of(self, way: str | None, sparsity: float | str) -> dict[int, Mapping[str, Any]]:
        """The contents by seed; what reads no data is the same for each."""
        if way in (None, "lamp"):
            key = (way, 0.0 if way is None else sparsity, self.seeds[0])
            return dict.fromkeys(self.seeds, self.contents[key]) if key in self.contents else {}
        found = {seed: self.contents.get((way, sparsity, seed)) for seed in self.seeds}
        return {seed: content for seed, content in found.items() if content is not None}

    def values(self, way: str | None, sparsity: float | str, measure: str) -> dict[int, Values]:
        """By seed what was measured of each sample of the test."""
        found = self.of(way, sparsity)
        return {seed: np.array(content["test"][measure], float) for seed, content in found.items()}

    def gains(self, way: str, base: str, sparsity: float | str, measure: str) -> dict[int, Values]:
        """By seed that both have the differences of each sample."""
        mine, its = (self.values(each, sparsity, measure) for each in (way, base))
        return {seed: mine[seed] - its[seed] for seed in mine.keys() & its.keys()}


def page(found: Found) -> str:
    """The Markdown of what there is."""
    there, asked = len(found.contents), len(found.asked)
    lines = [f"# {TITLE}", "", *_COMMANDS, "", _PREFACE, ""]
    if there < asked:
        lines += [f"**{asked - there} of {asked} cells are missing**: `-`, or fewer seeds.", ""]
    lines += ["## The test split", "", *_figures(found), ""]
    for title, pairs, pooled in (
        ("Block by block, minus the whole-model pass", BY_WALK, True),
        ("Token selections, minus all tokens in the same walk", BY_TOKENS, False),
        ("Budgets of blocks, minus the same sparsity in every layer or row", BY_BUDGETS, False),
        ("Other methods, minus ALPS", BY_METHOD, False),
    ):
        lines += [f"## {title}", "", *_gains(found, pairs, pooled=pooled), ""]
    return "\n".join([*lines, *_chosen(found)]).rstrip() + "\n"


_COMMANDS = (
    "    python -m benchmarks.papers chat --render   # writes this page",
    "    python -m benchmarks.papers chat            # runs the missing cells",
)
_PREFACE = (
    "The demo's LLaVA (`benchmarks/demo/models/chat`), pruned in one shot and not fine-tuned. "
    f"Calibration: {SAMPLES} samples in batches of {BATCH}, half of them captions, half questions "
    f"about other scenes, drawn for each seed from {POOL} of either. Measured on {QUESTIONS} "
    "scenes with handwriting and combinations that training never showed: answers that are right, "
    f"captions of the first {CAPTIONS} that name exactly what is there (%), and the cross-entropy "
    "of the answers (nats per token). The first ± is one standard error over these scenes, the "
    "second, where there are several seeds, one over seeds. A difference is taken scene by scene "
    "and seed by seed; bold is one beyond two standard errors, of both together: of 20 differences "
    "that are none one is. `lamp` is global and reads no data; `multiflow` prunes each modality, "
    "`alps`, `alps+`, `chita` and `sparsegpt` each layer, the others each row equally. "
    f"`{PATTERN}` leaves no budgets, so `tamp` is its token selection alone there."
)


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
    return markdown(["Sparsity", "Method", *MEASURES.values(), "Seeds"], rows)


def _row(found: Found, way: str | None, sparsity: float | str, title: str) -> list[str]:
    fixed = way in (None, "lamp")
    texts = []
    for measure in MEASURES:
        by_seed = found.values(way, sparsity, measure)
        figure = Figure.of(dict(list(by_seed.items())[:1]) if fixed else by_seed)
        texts.append(figure.text(measure) if figure else "-")
    return [title, way or "dense", *texts, "any" if fixed else str(len(found.of(way, sparsity)))]


def _gains(found: Found, pairs: Sequence[tuple[str, str]], *, pooled: bool) -> list[str]:
    """A row for each pair and sparsity; `pooled`: also one of the mean over pairs."""
    rows = []
    for sparsity in _ordered(found):
        gains = {
            f"{way} - {base}": {m: found.gains(way, base, sparsity, m) for m in MEASURES}
            for way, base in pairs
        }
        there = {name: each for name, each in gains.items() if each["answers"]}
        if pooled and there:
            seeds = set.intersection(*(set(each["answers"]) for each in there.values()))
            there["mean of these"] = {
                m: {s: np.mean([each[m][s] for each in there.values()], axis=0) for s in seeds}
                for m in MEASURES
            }
        for name, each in there.items():
            figures = {m: Figure.of(by_seed) for m, by_seed in each.items()}
            texts = [_gain(m, figure) for m, figure in figures.items()]
            rows.append([_title(sparsity), name, *texts, str(len(each["answers"]))])
    return markdown(["Sparsity", "Method", *MEASURES.values(), "Seeds"], rows)


def _gain(measure: str, figure: Figure | None) -> str:
    if figure is None:
        return "-"
    text = figure.text(measure, "+")
    return bold(text) if figure.beyond else text


def _chosen(found: Found) -> list[str]:
    """The order on the development split, and the first of it against `USUAL` on the test."""
    names = [way.name for way in WAYS]
    levels = [sparsity for sparsity in _ordered(found) if sparsity != PATTERN]
    cells = [
        (sparsity, seed)
        for sparsity in levels
        for seed in found.seeds
        if all(seed in found.of(name, sparsity) for name in names)
    ]
    if not cells:
        return []
    dev = {
        name: {
            m: float(np.mean([found.of(name, at)[seed]["dev"][m] for at, seed in cells]))
            for m in MEASURES
        }
        for name in names
    }
    order = sorted(names, key=lambda name: dev[name]["losses"])
    rows = [
        [name, f"{100 * dev[name]['captions']:.1f}", f"{100 * dev[name]['answers']:.1f}",
         f"{dev[name]['losses']:.3f}"] for name in order
    ]  # fmt: skip
    where = ", ".join(f"{_title(at)} seed {seed}" for at, seed in cells)
    first = next(name for name in order if name != USUAL)
    return [
        "## Chosen on the development split",
        "",
        f"By the loss of the answers, mean over the cells that all have ({where}):",
        "",
        *markdown(["Method", *MEASURES.values()], rows),
        "",
        f"First is `{order[0]}`. `{first}` on the test split, minus the usual `{USUAL}`:",
        "",
        *_gains(found, [(first, USUAL)], pooled=False),
    ]
