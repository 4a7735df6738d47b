"""The lock on a model that fully_shard has divided between two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from lock_in_processes import adamw, train
from toy_loops import towers

from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("lock_in_processes.py")


def test_two_processes_train_under_the_lock_like_one(tmp_path):
    model = towers()
    adapter = ModuleAdapter(model)
    masks = prune(model, adapter=adapter, method="omp", sparsity=0.6)
    masks.save(tmp_path / "masks.safetensors")

    paths = [str(ROOT), *(path for path in sys.path if path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launch, "2", str(SCRIPT), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    optimizer = adamw(model)
    SparsityLock(model, masks, adapter).attach(optimizer)
    train(model, optimizer, 5)
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value)
    for name, mask in masks.items():
        assert not found[f"{name}.weight"][~mask].any()
