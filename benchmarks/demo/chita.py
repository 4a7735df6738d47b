"""python -m benchmarks.demo.chita: the demo models pruned by gradient and second-order methods.

R@1 without fine-tuning beside MULTIFLOW's and OMP's, and for CHITA the objective beside the model:
a lower objective is not always a better model. Calibration: batches of 4 pairs, so that the rows
of CHITA are many; MULTIFLOW and SNIP read the same batches.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as chatter

from benchmarks.demo import MODELS, SPARSITIES
from benchmarks.demo.build_data import build
from benchmarks.demo.measure import Subject
from benchmarks.results import add_record_options, recorded
from vlp_plugins.loading import batches
from vlp_plugins.models.adapter import Batch
from vlp_plugins.pruning import prune

BATCH_SIZE = 4
BUDGET = "8GiB"

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A method as the table names it, and what `prune` is given."""

    title: str
    method: str
    parameters: dict[str, Any]
    variant: str = "default"


RUNS = (
    Run("omp", "omp", {}),
    Run("multiflow", "multiflow", {}),
    Run("snip", "snip", {}),
    Run("itersnip", "itersnip", {"rounds": 8}),
    Run("chita", "chita", {"lambda": "auto"}),
    Run("chita, magnitude", "chita", {"lambda": "auto", "effort": "published"}),
    Run("chita++", "chita++", {"lambda": "auto", "rounds": 4}),
    Run("chita, published", "chita", {"lambda": 0.1}, "published"),
)
EFFORTS = (
    Run("best", "chita", {"lambda": 1e-8, "effort": "best"}),
    Run("no blocks, fast", "chita", {"lambda": 1e-8, "block_size": None}),
    Run("no blocks, best", "chita", {"lambda": 1e-8, "block_size": None, "effort": "best"}),
    Run("blocks of 500", "chita", {"lambda": 1e-8, "block_size": 500}),
    Run("blocks of 2000", "chita", {"lambda": 1e-8, "block_size": 2000}),
    Run("blocks of 10000", "chita", {"lambda": 1e-8, "block_size": 10000}),
    Run("blocks of 2000, magnitude", "chita", {"lambda": 1e-8, "effort": "published"}),
    Run("first order", "chita", {"lambda": 0.1, "first_order": True}),
)
"""The same rows, other ways to solve: what decides is not the objective."""


def measured(
    subject: Subject, pairs: Iterable[Batch], run: Run, sparsities: Sequence[float]
) -> Iterator[Row]:
    """Prunes once and measures every sparsity."""
    start = time.perf_counter()
    found = prune(
        subject.model,
        pairs,
        adapter=subject.adapter,
        method=run.method,
        sparsity=list(sparsities),
        variant=run.variant,
        memory_budget=BUDGET,
        **run.parameters,
    )
    seconds = time.perf_counter() - start
    for sparsity, masks in zip(sparsities, found, strict=True):
        yield {
            "run": run.title,
            "sparsity": sparsity,
            **subject.measure_under(masks).as_dict(),
            "removed": masks.removed,
            "seconds": round(seconds, 1),
            "parameters": masks.manifest.parameters,
        }


def text_of(row: Row) -> str:
    """A line of the table."""
    known = row["parameters"]
    captions = "" if row["captions"] is None else f"{row['captions']:6.1f}"
    solved = ""
    if "objective" in known:
        solved = f"  lambda {known['lambda']:.2g}, F {known['objective']:.4g}"
    return (
        f"{row['run']:26} {row['sparsity']:5.0%} {row['image_to_text']:6.1f} "
        f"{row['text_to_image']:6.1f} {captions:6}{solved}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.demo.chita", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["blip", "xvlm"])
    parser.add_argument("--batches", type=int, default=128, help="of 4 pairs")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--pairs", type=int, default=1000, help="unseen test pairs")
    parser.add_argument("--efforts", action="store_true", help="ways to solve, beside one another")
    parser.add_argument("--runs", nargs="+", help="titles of runs; all if left out")
    add_record_options(parser)
    options = parser.parse_args()
    chatter.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("vlp_plugins.methods").setLevel(logging.INFO)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    runs = EFFORTS if options.efforts else RUNS
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        build(data, calibration=BATCH_SIZE * options.batches, downstream=0, test=options.pairs)
        for name in options.models:
            subject = Subject.load(MODELS / name, data)
            pairs = batches(data / "calibration", subject.model, batch_size=BATCH_SIZE)
            print(f"{name}: dense {subject.measure().as_dict()}", flush=True)
            for run in runs:
                if options.runs and run.title not in options.runs:
                    continue
                for row in measured(subject, pairs, run, options.sparsities):
                    rows.append({"model": name, **row})
                    print(text_of(row), flush=True)
    title = "demo_chita_efforts" if options.efforts else "demo_chita"
    if len(options.models) == 1:
        title += f"-{options.models[0]}"
    figures = {"pairs": options.pairs, "batches": options.batches, "rows": rows}
    print(recorded(title, figures, options.out))


if __name__ == "__main__":
    main()
