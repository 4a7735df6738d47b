"""python -m benchmarks.demo.tamt: what training masks brings with few steps, and what it did.

On the demo models: magnitudes (OMP), SNIP and IterSNIP, mask training as published and ours, all
with the same calibration pairs; mask training with the same number of steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.demo import MODELS, SPARSITIES
from benchmarks.demo.build_data import build
from benchmarks.demo.measure import Subject
from benchmarks.demo.processors import FAMILIES
from benchmarks.results import add_record_options, recorded
from vlp_plugins.models.request import Variant
from vlp_plugins.pruning import prune

CALIBRATION = 512
ROUNDS = 8

Row = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to find masks.

    Attributes:
        title: in the table.
        method: registered name.
        parameters: of the method.
        variant: of the method.
    """

    title: str
    method: str
    parameters: dict[str, Any]
    variant: Variant = "default"


def ways(steps: int) -> list[Way]:
    """What is compared; mask training with that many steps."""
    return [
        Way("omp", "omp", {}),
        Way("snip", "snip", {}),
        Way(f"itersnip, {ROUNDS} rounds", "itersnip", {"rounds": ROUNDS}),
        Way("tamt, published", "tamt", {"steps": steps}, "published"),
        Way("tamt", "tamt", {"steps": steps}),
    ]


def measure_ways(
    subject: Subject, found: Sequence[Way], sparsities: Sequence[float]
) -> Iterator[Row]:
    """A row per way and sparsity: R@1 both ways, captions that are right, seconds to prune to all.

    Args:
        subject: the model and its data; as before afterwards.
        found: what to compare.
        sparsities: fractions removed.
    """
    batches = list(subject.calibration)
    for way in found:
        start = time.perf_counter()
        masks = prune(
            subject.model,
            batches,
            adapter=subject.adapter,
            method=way.method,
            sparsity=list(sparsities),
            variant=way.variant,
            **way.parameters,
        )
        seconds = time.perf_counter() - start
        for sparsity, each in zip(sparsities, masks, strict=True):
            yield {
                "model": subject.source.name,
                "way": way.title,
                "sparsity": sparsity,
                **subject.measure_under(each).as_dict(),
                "removed": each.removed,
                "pruning_seconds": round(seconds, 1),
            }


def line_of(row: Row) -> str:
    """A row for the terminal."""
    captions = "" if row["captions"] is None else f"{row['captions']:>6.1f}"
    return (
        f"{row['model']:5} {row['way']:19} {row['sparsity']:>4.0%} "
        f"{row['image_to_text']:>6.1f} {row['text_to_image']:>6.1f} {captions:>6} "
        f"{row['pruning_seconds']:>7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.demo.tamt", description=__doc__)
    parser.add_argument("--models-dir", type=Path, default=MODELS)
    add_record_options(parser)
    parser.add_argument("--pairs", type=int, default=500, help="unseen test pairs")
    parser.add_argument("--steps", type=int, default=48, help="of mask training")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(f"{'model':5} {'':19} {'':>4} {'i2t':>6} {'t2i':>6} {'words':>6} {'seconds':>7}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        build(data, calibration=CALIBRATION, downstream=0, test=args.pairs)
        for family in FAMILIES:
            subject = Subject.load(args.models_dir / family, data)
            for row in measure_ways(subject, ways(args.steps), args.sparsity):
                rows.append(row)
                print(line_of(row), flush=True)
    figures = {
        "pairs": args.pairs,
        "calibration": CALIBRATION,
        "steps": args.steps,
        "rows": rows,
    }
    print(recorded("demo_tamt", figures, args.out))


if __name__ == "__main__":
    main()
