"""What two processes do with a lock on wrapped models; started by test_lock_wrapped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from leaving import leave
from test_trainer_callbacks import tiny_model, trainer_for
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from toy_loops import towers

from vlp_plugins.hosts.accelerate import locked
from vlp_plugins.hosts.transformers import LockCallback
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.sharding import here, whole

STEPS, ACCUMULATE, CLIP = 4, 2, 0.05
ADAMW = {"lr": 0.05, "weight_decay": 0.1}


def batches() -> list[list[torch.Tensor]]:
    """For every step the batches that are accumulated, `[4, 6]` each."""
    rng = torch.Generator().manual_seed(1)
    return [[torch.randn(4, 6, generator=rng) for _ in range(ACCUMULATE)] for _ in range(STEPS)]


def share(batch: torch.Tensor) -> torch.Tensor:
    """What this process has of a batch: half of it, so that means of two are that of all."""
    if not distributed.is_initialized():
        return batch
    return batch.chunk(2)[distributed.get_rank()]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).float().square().mean() / ACCUMULATE


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """A loop with accumulation and clipping; returns the norms that gradients were clipped by."""
    norms = []
    for step in batches():
        optimizer.zero_grad()
        for number, batch in enumerate(step):
            last = number == ACCUMULATE - 1
            quiet = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if quiet else contextlib.nullcontext():
                loss_of(model, share(batch)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        norms.append(whole(norm).item())
        optimizer.step()
    return norms


def locked_training(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks) -> dict:
    lock = SparsityLock(model, masks, ModuleAdapter(towers())).attach(optimizer)
    norms = train(model, optimizer)
    lock.check()
    return {"norms": norms, **state_of(model)}


def state_of(model: nn.Module) -> dict:
    state = {name: whole(value) for name, value in model.state_dict().items()}
    return {name.removeprefix("module."): value.clone() for name, value in state.items()}


def data_parallel(masks: Masks, _: Path) -> dict:
    model = DistributedDataParallel(towers())
    return locked_training(model, torch.optim.AdamW(model.parameters(), **ADAMW), masks)


def optimizer_in_shards(masks: Masks, _: Path) -> dict:
    model = DistributedDataParallel(towers(), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **ADAMW)
    return locked_training(model, optimizer, masks)


def sharded(masks: Masks, _: Path) -> dict:
    model = fully_shard(towers())
    return locked_training(model, torch.optim.AdamW(model.parameters(), **ADAMW), masks)


def sharded_bfloat16(masks: Masks, _: Path) -> dict:
    model = towers()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model[0], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return locked_training(model, torch.optim.AdamW(model.parameters(), **ADAMW), masks)


def accelerator_with(**options: object) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, **options)


def with_accelerate(masks: Masks, folder: Path, accelerator: Accelerator) -> dict:
    """A loop as its documentation has it, and a checkpoint that is refused."""
    folder = folder / f"{accelerator.distributed_type}-{accelerator.mixed_precision}"
    good, bad = folder / "good", folder / "bad"
    model = towers()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    lock = SparsityLock(model, masks, ModuleAdapter(towers())).attach(optimizer)
    norms = []
    with locked(accelerator, lock):
        for step in batches():
            for batch in step:
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, share(batch)) * ACCUMULATE)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
                        norms.append(whole(norm).item())
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        accelerator.save_state(str(good))
        accelerator.wait_for_everyone()
        state = state_of(model)
        spoil(model)
        accelerator.load_state(str(good))
        lock.check()
        spoil(model)
        with pytest.raises(MaskError, match="removed elements"):
            accelerator.save_state(str(bad))
        lock.apply()
    assert good.is_dir()
    assert not bad.exists()
    assert not optimizer.optimizer._optimizer_step_post_hooks
    return {"norms": norms, **state}


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            here(parameter).fill_(1.0)


def accelerate(masks: Masks, folder: Path) -> dict:
    return with_accelerate(masks, folder, accelerator_with())


def accelerate_bfloat16(masks: Masks, folder: Path) -> dict:
    return with_accelerate(masks, folder, accelerator_with(mixed_precision="bf16"))


def accelerate_sharded(masks: Masks, folder: Path) -> dict:
    accelerator = accelerator_with()
    # It knows FSDP on accelerators only; what it does then runs on CPUs as well.
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    return with_accelerate(masks, folder, accelerator)


def trainer(masks: Masks, folder: Path) -> dict:
    """Trainer of transformers, whose processes have each their own batches."""
    AcceleratorState._reset_state(reset_partial_state=True)
    masks = Masks.load(folder / "bert.safetensors")
    model = tiny_model()
    callback = LockCallback(masks, ModuleAdapter(model))
    trainer = trainer_for(model, folder / "trainer", callback, bf16=True)
    assert trainer.args.world_size == 2
    trainer.train()
    return state_of(model)


RUNS: list[Callable[[Masks, Path], dict]] = [
    data_parallel,
    optimizer_in_shards,
    sharded,
    sharded_bfloat16,
    accelerate,
    accelerate_bfloat16,
    accelerate_sharded,
    trainer,
]


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    place = Path(sys.argv[1])
    for run in RUNS:
        found = run(Masks.load(place / "masks.safetensors"), place)
        torch.save(found, place / f"{run.__name__}-{distributed.get_rank()}.pt")
    leave()
