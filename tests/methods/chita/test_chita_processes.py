"""Two processes find what one finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chita_runs import context_of, pruned_weights
from two_processes import run_two_processes

from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.method import chita, chita_plus_plus

SCRIPT = """
import sys
from pathlib import Path
from torch import distributed
from chita_runs import context_of
from test_chita_processes import METHODS
from vlp_plugins.runtime.distributed import before_joining

folder = Path(sys.argv[1])
before_joining()
distributed.init_process_group("gloo")
rank = distributed.get_rank()
for name, method in METHODS.items():
    method.run(context_of())[0].save(folder / f"{name}{rank}")
method = METHODS["stages"]
method.run(context_of(workplace=folder))
method.run(context_of(workplace=folder, resume=True))[0].save(folder / f"resumed{rank}")
distributed.barrier()  # gloo may abort a process whose peer is still at work
distributed.destroy_process_group()
"""

METHODS = {
    "given": chita(lambda_=0.1),
    "full": chita(lambda_=0.1, block_size=None),
    "auto": chita(lambda_="auto", effort="published", held_out=3),
    "stages": chita_plus_plus(lambda_=0.1, rounds=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes under torchrun left what they found."""
    folder = tmp_path_factory.mktemp("torchrun")
    run_two_processes(SCRIPT, folder)
    return folder


@pytest.mark.parametrize("name", [*METHODS, "resumed"])
def test_both_processes_find_what_one_finds(folder, name):
    context = context_of()
    expected = METHODS.get(name, METHODS["stages"]).run(context)[0]

    both = [Masks.load(folder / f"{name}{rank}") for rank in (0, 1)]

    assert both[0] == both[1]
    assert all(torch.equal(both[0][weight], expected[weight]) for weight in expected)
    one, two = pruned_weights(context, expected), pruned_weights(context, both[0])
    assert all(torch.allclose(one[weight], two[weight], atol=1e-5) for weight in one)
