"""The lock on a model that fully_shard has divided between two processes."""

from __future__ import annotations

from pathlib import Path

import torch
from lock_in_processes import adamw, train
from toy_loops import towers
from two_processes import run_two_processes

from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune

SCRIPT = Path(__file__).with_name("lock_in_processes.py")


def test_two_processes_train_under_the_lock_like_one(tmp_path):
    model = towers()
    adapter = ModuleAdapter(model)
    masks = prune(model, adapter=adapter, method="omp", sparsity=0.6)
    masks.save(tmp_path / "masks.safetensors")

    run_two_processes(SCRIPT, tmp_path)
    optimizer = adamw(model)
    SparsityLock(model, masks, adapter).attach(optimizer)
    train(model, optimizer, 5)
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value)
    for name, mask in masks.items():
        assert not found[f"{name}.weight"][~mask].any()
