"""python -m benchmarks.demo.owners: whose inputs should count for a weight that is shared?

On BLIP, MULTIFLOW with the statistics of the first module that uses a weight (as published)
against those of all modules that use it. Both come from the same data passes, so that they differ
in nothing else. The answer is the default of `prune(owners=...)`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from transformers.utils import logging

from benchmarks.demo import MODELS, SPARSITIES
from benchmarks.demo.build_data import build
from benchmarks.demo.measure import CALIBRATION_BATCH, Subject
from benchmarks.results import add_record_options, recorded
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.loading import batches
from vlp_plugins.methods.composition import composed
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.request import Owners
from vlp_plugins.models.weights import WeightMap

POOL = 2000  # pairs that calibration samples are drawn from
SAMPLES = (512, 64)
DRAWS = 3

Row = dict[str, Any]


def compare_owners(
    subject: Subject, data: Path, samples: int, draw: int, sparsities: Sequence[float] = SPARSITIES
) -> list[Row]:
    """Figures of both ways at every sparsity, from one data pass.

    Args:
        subject: the model, and the pairs to measure with.
        data: image folder that calibration pairs are drawn from.
        samples: pairs to read, a multiple of the batch size.
        draw: seed of the draw.
        sparsities: fractions removed.
    """
    weights = WeightMap.of(subject.model, subject.adapter)
    method = composed(make_method(registry(), "multiflow"))
    drawn = batches(
        data,
        subject.model,
        batch_size=CALIBRATION_BATCH,
        count=samples // CALIBRATION_BATCH,
        seed=draw,
    )
    statistics = calibrate(subject.model, subject.adapter, weights, drawn, method.needs)
    rows = []
    context = Context(subject.model, subject.adapter, weights, targets=sparsities)
    by_owners = {
        owners: method.masks(replace(context, owners=owners), statistics)
        for owners in get_args(Owners)
    }
    for owners, found in by_owners.items():
        rows += [
            {
                "owners": owners,
                "samples": samples,
                "draw": draw,
                "sparsity": sparsity,
                **subject.measure_under(masks).as_dict(),
                "kept_by_both_or_either": masks.compare(other)["all"].iou,
            }
            for sparsity, masks, other in zip(sparsities, found, by_owners["first"], strict=True)
        ]
    return rows


def averages(rows: Sequence[Row]) -> list[str]:
    """A line per sample size, sparsity and way: the means over the draws."""
    lines = [f"{'samples':>8} {'sparsity':>8} {'owners':>6} {'i2t':>6} {'t2i':>6} {'captions':>8}"]
    groups: dict[tuple[int, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["samples"], row["sparsity"], row["owners"]), []).append(row)
    for (samples, sparsity, owners), group in sorted(groups.items()):
        means = [
            fmean(row[key] for row in group)
            for key in ("image_to_text", "text_to_image", "captions")
        ]
        lines.append(
            f"{samples:>8} {sparsity:>8.0%} {owners:>6} "
            f"{means[0]:>6.1f} {means[1]:>6.1f} {means[2]:>8.1f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.demo.owners", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODELS / "blip")
    add_record_options(parser)
    parser.add_argument("--pairs", type=int, default=1000, help="unseen test pairs")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of calibration pairs, each size")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        build(data, calibration=POOL, downstream=0, test=args.pairs)
        subject = Subject.load(args.model, data)
        for samples in SAMPLES:
            for draw in range(args.draws):
                rows += compare_owners(subject, data / "calibration", samples, draw)
    print("\n".join(averages(rows)))
    print(recorded("demo_owners", {"pairs": args.pairs, "rows": rows}, args.out))


if __name__ == "__main__":
    main()
