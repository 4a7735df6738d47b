"""The lock under DistributedDataParallel, fully_shard, accelerate and Trainer, in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from two_processes import run_two_processes

pytest.importorskip("accelerate")

from lock_wrapped import ADAMW, locked_training
from test_trainer_callbacks import tiny_model
from toy_loops import towers

from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune

SCRIPT = Path(__file__).with_name("lock_wrapped.py")
EXACT = ("data_parallel", "optimizer_in_shards", "sharded", "accelerate", "accelerate_sharded")
BFLOAT16 = ("sharded_bfloat16", "accelerate_bfloat16")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where two processes have left what they trained."""
    folder = tmp_path_factory.mktemp("wrapped")
    for model, name, sparsity in ((towers(), "masks", 0.6), (tiny_model(), "bert", 0.8)):
        masks = prune(model, adapter=ModuleAdapter(model), method="omp", sparsity=sparsity)
        masks.save(folder / f"{name}.safetensors")
    run_two_processes(SCRIPT, folder)
    return folder


@pytest.fixture(scope="module")
def alone(place) -> dict:
    """The same training in one process."""
    model = towers()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    return locked_training(model, optimizer, Masks.load(place / "masks.safetensors"))


def found_by(place: Path, name: str, rank: int) -> dict:
    return torch.load(place / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", [*EXACT, *BFLOAT16])
def test_two_processes_train_like_one_and_keep_the_zeros(name, place, alone):
    tolerance = {"atol": 5e-3, "rtol": 5e-3} if name in BFLOAT16 else {"atol": 1e-6, "rtol": 1e-5}
    masks = Masks.load(place / "masks.safetensors")
    for rank in (0, 1):
        found = found_by(place, name, rank)
        # Norms are equal only if removed weights count in none of them.
        torch.testing.assert_close(found.pop("norms"), alone["norms"], **tolerance)
        assert set(found) == set(alone) - {"norms"}
        for key, value in found.items():
            torch.testing.assert_close(value, alone[key], **tolerance)
        for weight in masks:
            assert torch.equal(found[f"{weight}.weight"] != 0, masks[weight])


def test_trainer_in_two_processes_keeps_the_zeros(place):
    masks = Masks.load(place / "bert.safetensors")
    states = [found_by(place, "trainer", rank) for rank in (0, 1)]
    for weight in masks:
        assert torch.equal(states[0][f"{weight}.weight"] != 0, masks[weight])
        assert torch.equal(states[0][f"{weight}.weight"], states[1][f"{weight}.weight"])
    assert len(list((place / "trainer").glob("checkpoint-*/vlp_masks.safetensors"))) == 3
