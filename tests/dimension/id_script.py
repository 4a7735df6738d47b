"""What two processes do with dimensions; started by test_id_processes under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from leaving import leave
from torch import distributed
from torch.distributed.fsdp import fully_shard
from toy import ToyAdapter, toy_batches, toy_model

from benchmarks.parity.family import Family
from vlp_plugins.dimension import points as room
from vlp_plugins.dimension.measure import measure
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, NonFiniteError

GOLDEN = Path(__file__).parents[1] / "golden"
BATCHES = 11
TIGHT = 30_000


def run(batches, model=None, adapter: Adapter | None = None, **options) -> IdProfile:
    model, adapter = model or toy_model(), adapter or ToyAdapter()
    return measure(model, adapter, WeightMap.of(model, adapter), batches, **options)


def error_of(kind: type[Exception], batches) -> str:
    try:
        run(batches)
    except kind as error:
        return str(error)
    return "no error"


def interrupted(folder: Path) -> IdProfile:
    """A run that stops in its second pass, and goes on."""

    def stop(done: int, _: int | None) -> None:
        if done == BATCHES + 2:
            raise KeyboardInterrupt

    options = {"memory_budget": TIGHT, "workplace": folder}
    try:
        run(toy_batches(BATCHES), progress=stop, **options)
    except KeyboardInterrupt:
        distributed.barrier()
    return run(toy_batches(BATCHES), resume=True, **options)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    room.working_bytes = lambda *_: 700
    rank = distributed.get_rank()
    vit = Family(GOLDEN / "vit")
    sharded = vit.model()
    fully_shard(sharded)
    spoilt = toy_batches(BATCHES)
    spoilt[3]["pixel_values"][0] = float("nan")
    found = {
        "whole": run(toy_batches(BATCHES)),
        "tight": run(toy_batches(BATCHES), memory_budget=TIGHT),
        "halves": run(toy_batches(BATCHES), dtype=torch.bfloat16),
        "few": run(toy_batches(1, size=30)),
        "resumed": interrupted(folder / "work"),
        "sharded": run(vit.batches(), sharded, registry().adapter_for(sharded)),
    }
    for name, profile in found.items():
        profile.save(folder / f"{name}{rank}.json")
    (folder / f"nan{rank}").write_text(error_of(NonFiniteError, spoilt))
    (folder / f"data{rank}").write_text(error_of(DataError, toy_batches(8, seed=rank)))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
