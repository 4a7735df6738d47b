"""What two processes do with a lock on a model under fully_shard; started by test_lock_sharded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from leaving import leave
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from toy_loops import towers

from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.gradual.pruning import GradualPruning
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.runtime.errors import MaskError, UnsupportedError
from vlp_plugins.runtime.sharding import here, whole


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=rng)).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, foreach=False)


def main(folder: Path) -> None:
    """Every process trains the same batches under the lock; process 0 says what came out."""
    masks = Masks.load(folder / "masks.safetensors")
    model = towers()
    fully_shard(model[2])
    fully_shard(model)
    adapter = ModuleAdapter(model)
    optimizer = adamw(model)
    lock = SparsityLock(model, masks, adapter).attach(optimizer)
    train(model, optimizer, 5)
    lock.check()
    state = {name: whole(value) for name, value in model.state_dict().items()}

    with torch.no_grad():
        here(model[0].weight).fill_(1.0)
    removed = int((~masks["0"]).sum())
    with pytest.raises(MaskError, match=f"{removed} of {removed} removed"):
        lock.check()
    with pytest.raises(UnsupportedError, match="SparsityLock does"):
        GradualPruning(model, sparsity=0.5, steps=10, adapter=adapter)
    if distributed.get_rank() == 0:
        torch.save(state, folder / "state.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    main(Path(sys.argv[1]))
    leave()
