"""Run by `torchrun` in the test beside it: what every process finds is saved."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed
from toy import toy_batches
from toy_loss import spoilt
from toy_rows import N, toy_columns, toy_rows

from vlp_plugins.methods.chita.rows.gradients import GradientRows
from vlp_plugins.runtime.distributed import before_joining
from vlp_plugins.runtime.errors import VlpError

SMALL = 4000


def mine(rows: GradientRows) -> dict[int, torch.Tensor]:
    return {start: part.float().clone() for start, part in rows.parts()}


def error_of(**options) -> str:
    try:
        with toy_rows(**options):
            return "none"
    except VlpError as error:
        return f"{type(error).__name__}: {error}"


def blip(folder: Path, golden: Path) -> None:
    from test_rows_of_models import solved

    from benchmarks.parity.family import Family
    from vlp_plugins.models.discovery import registry

    family = Family(golden / "blip")
    model = family.model()
    adapter = registry().adapter_for(model)
    for block_size in (200, None):
        for keep_in, budget in (("disk", None), ("passes", 200_000)):
            way = (keep_in, budget)
            rows, found = solved(model, adapter, family.batches()[:3], block_size, way)
            name = f"blip-{keep_in}-{block_size}-{distributed.get_rank()}"
            torch.save((rows, found.support, found.values, found.objective), folder / name)


def main(folder: Path, golden: Path) -> None:
    before_joining()
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    skipping = toy_batches(N)
    skipping[1], skipping[4] = spoilt(skipping[1]), spoilt(skipping[4])
    for way in ("ram", "disk", "passes"):
        options = {
            "keep_in": way,
            "budget": SMALL if way != "ram" else None,
            "folder": folder / "d",
        }
        with toy_rows(**options) as rows:
            parts = [mine(rows), mine(rows)]
            vector = torch.full((rows.p,), torch.nan)
            bits = torch.zeros(rows.p, dtype=torch.bool)
            for start, part in rows.parts():
                vector[start : start + part.shape[1]] = part.sum(0)
                bits[start : start + part.shape[1]] = part[0] > 0
            rows.fill(vector)
            rows.fill(bits)
            sums = rows.add_up(torch.tensor([rank + 1.0]))
        with toy_rows(skipping, skip=True, **options) as rows:
            skipped = (rows.n, mine(rows), mine(rows))
        with toy_rows(dtype=torch.bfloat16, **options) as rows:
            mine(rows)
            rounding = rows.rounding
        torch.save((parts, vector, bits, sums, skipped, rounding), folder / f"{way}{rank}")
    broken = toy_batches(N)
    broken[3] = spoilt(broken[3])
    blocked = folder / f"blocked{rank}"
    if rank:
        blocked.write_text("")  # process 1 cannot make a folder there
    errors = {
        "gradient": error_of(batches=broken),
        "fewer": error_of(batches=toy_batches(3)),
        "other": error_of(batches=toy_batches(2 + rank)),
        "disk": error_of(keep_in="disk", folder=blocked),
        "budget": error_of(budget=100),
    }
    torch.save((errors, toy_columns().p), folder / f"errors{rank}")
    blip(folder, golden)
    distributed.barrier()  # gloo may abort a process whose peer is gone already
    distributed.destroy_process_group()


main(Path(sys.argv[1]), Path(sys.argv[2]))
