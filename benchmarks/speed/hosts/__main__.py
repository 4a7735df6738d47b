"""python -m benchmarks.speed.hosts: every registered method alone, in NNI and in Torch-Pruning.

On small recorded models of BLIP (whose text towers share weights) and X-VLM:

- the same masks and weights with and without NNI, bit for bit;
- shared weights are still shared, and `save_pretrained` / `from_pretrained` keep the zeros;
- the method cuts the model as an importance of Torch-Pruning.

`--full-size` adds OMP and MULTIFLOW on BLIP base at 224 px with one `global_group_id`, where NNI
may take at most three times as long as `prune` alone. The exit code is 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.parity.family import Family
from benchmarks.results import add_record_options, recorded
from benchmarks.speed.hosts import through_nni, through_torch_pruning
from benchmarks.speed.hosts.measured import NNI_TARGET, Row, Subject
from benchmarks.speed.multiflow import full_size, random_batches
from vlp_plugins.plugins import registry

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
QUICK: dict[str, dict[str, Any]] = {
    "chita": {"lambda": 0.1},
    "chita++": {"lambda": 0.1, "rounds": 2},
    "itersnip": {"rounds": 2},
}
"""Parameters with which methods take less time and are the same methods."""


def small(family: str, golden: Path) -> Subject:
    """A recorded model."""
    recorded = Family(golden / family)
    return Subject(family, recorded.model, recorded.batches()[:4])


def large(batches: int) -> Subject:
    """BLIP base with random weights."""
    device = torch.device("cpu")
    data: list[Any] = random_batches(batches, 8, device)
    return Subject("blip base", lambda: full_size("blip", device), data, full_size=True)


def line(row: Row) -> str:
    """One line of the table."""
    cut = {None: "-", True: "yes", False: "NO"}[row.torch_pruning]
    said = ["yes" if held else "NO" for held in (row.identical, row.ties, row.round_trip)]
    return (
        f"{row.subject:10} {row.method:17} {row.alone_seconds:8.2f} {row.nni_seconds:8.2f} "
        f"{row.ratio:6.2f}   {said[0]:9} {said[1]:5} {said[2]:10} {cut:13} "
        f"{'ok' if row.ok else 'NOT OK'} {row.notes}"
    ).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["blip", "xvlm"], choices=["blip", "xvlm"])
    parser.add_argument("--methods", nargs="*", default=registry().method_names())
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--batches", type=int, default=2, help="of 8 pairs, at full size")
    parser.add_argument("--rounds", type=int, default=3, help="at full size; the best time counts")
    parser.add_argument("--golden", type=Path, default=GOLDEN)
    add_record_options(parser)
    options = parser.parse_args()
    print(f"{'model':10} {'method':17} {'alone s':>8} {'NNI s':>8} {'ratio':>6}   "
          "identical ties  round trip torch-pruning")  # fmt: skip
    rows = []
    for family in options.models:
        subject = small(family, options.golden)
        for method in options.methods:
            parameters = QUICK.get(method, {})
            row = through_nni.measure(subject, method, parameters)
            held, why = through_torch_pruning.works(subject, method, parameters)
            rows.append(replace(row, torch_pruning=held, notes=why))
            print(line(rows[-1]), flush=True)
    if options.full_size:
        for method in ("omp", "multiflow"):
            rows.append(through_nni.measure(large(options.batches), method, {}, options.rounds))
            print(line(rows[-1]), flush=True)
    failed = [row for row in rows if not row.ok]
    print(f"{len(rows) - len(failed)} of {len(rows)} ok; at full size NNI may take "
          f"{NNI_TARGET:g} times as long")  # fmt: skip
    print(recorded("hosts", [row.record() for row in rows], options.out))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    logging.getLogger("vlp_plugins").setLevel(logging.ERROR)  # which layers stay dense
    disable_progress_bar()
    sys.exit(main())
