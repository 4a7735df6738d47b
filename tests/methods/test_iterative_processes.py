"""Iterative methods on several processes find the masks that they find on one."""

from __future__ import annotations

import pytest
from toy import toy_batches
from toy_loss import LosingAdapter, losing_toy
from two_processes import run_two_processes

from vlp_plugins.masks.masks import Masks
from vlp_plugins.pruning import prune

SCRIPT = """
import sys
from pathlib import Path
from torch import distributed
from toy import toy_batches
from toy_loss import LosingAdapter, losing_toy
from vlp_plugins import prune
from vlp_plugins.runtime.distributed import before_joining

folder = Path(sys.argv[1])
before_joining()
distributed.init_process_group("gloo")
rank = distributed.get_rank()
model, adapter = losing_toy(), LosingAdapter()
options = {"adapter": adapter, "sparsity": 0.75}

def stop(done, total):
    if done == 5:
        raise KeyboardInterrupt

stages = {"method": "itersnip", "rounds": 3, "workplace": folder / "rounds", **options}
try:
    prune(model, toy_batches(6), progress=stop, **stages)
except KeyboardInterrupt:
    pass
prune(model, toy_batches(6), resume=True, **stages).save(folder / f"itersnip{rank}")
prune(model, toy_batches(6), method="tamt", **options).save(folder / f"tamt{rank}")
distributed.barrier()  # gloo may abort a process whose peer is still at work
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "rounds").mkdir()
    run_two_processes(SCRIPT, folder)
    return folder


@pytest.mark.parametrize("method", ["itersnip", "tamt"])
def test_both_processes_return_the_masks_of_one(folder, method):
    rounds = {"rounds": 3} if method == "itersnip" else {}

    alone = prune(
        losing_toy(),
        toy_batches(6),
        adapter=LosingAdapter(),
        method=method,
        sparsity=0.75,
        **rounds,
    )

    found = [Masks.load(folder / f"{method}{rank}") for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0] == alone


def test_the_first_process_alone_writes_the_rounds(folder):
    assert len(list((folder / "rounds").iterdir())) == 1
