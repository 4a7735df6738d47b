"""`accelerate`: the lock in a training loop, and fine-tuning in several processes.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    lock = SparsityLock(model, masks).attach(optimizer)
    with locked(accelerator, lock):
        ...  # the usual loop
        accelerator.save_state("state")

The lock itself needs nothing of `accelerate`; it is made of what `prepare` returns, because that
may have moved or sharded the parameters.

    with launched(autocast="bfloat16") as engine:
        finetune(model, adapter, batches, task="retrieval", masks=masks, engine=engine)

Every process has the whole model (DistributedDataParallel), so the masks are locked in each.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from vlp_plugins.calibration.loss import total
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.distributed import before_joining
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.tasks.finetuning.engine import Engine, TaskLoss

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType
except ImportError as error:
    raise ImportError(
        'fine-tuning in several processes needs accelerate: pip install "vlp-plugins[trainer]"'
    ) from error

_log = logging.getLogger(__name__)
_SAVING = ("save_state", "save_model")
_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_MIXED = {"bfloat16": "bf16", "float16": "fp16"}


@contextmanager
def locked(accelerator: Accelerator, lock: SparsityLock) -> Iterator[SparsityLock]:
    """Checks a lock at every save and at the end of the block, and detaches it there.

    In the block `accelerator.save_state` and `save_model` refuse weights that are not as sparse as
    the masks, before anything is written; `load_state` zeros what a state of a dense run brings.

    Args:
        accelerator: that has prepared the model.
        lock: attached to the optimizer.

    Raises:
        MaskError: when saving, and at the end of the block, if something that the masks remove is
            not zero.
    """
    # accelerate's own hooks come too late: of a sharded model the weights are written by then.
    replaced: dict[str, Any] = {
        name: partial(lock.save_checked, getattr(accelerator, name)) for name in _SAVING
    }
    replaced["load_state"] = partial(_load_masked, lock, accelerator.load_state)
    before = {name: vars(accelerator)[name] for name in replaced if name in vars(accelerator)}
    try:
        for name, function in replaced.items():
            setattr(accelerator, name, function)
        yield lock
        lock.check()
    finally:
        for name in replaced:
            delattr(accelerator, name)
        vars(accelerator).update(before)  # of another lock, in whose block this one is
        lock.detach()


def _load_masked(lock: SparsityLock, load: Any, *args: Any, **options: Any) -> None:
    load(*args, **options)
    if found := lock.violations():
        _log.warning(
            "the state that was loaded is of a model that is not as sparse as the masks (first: "
            "%r, %d of %d removed elements); they are zeroed now",
            found[0].weight,
            found[0].revived,
            found[0].removed,
        )
        lock.apply()


class AccelerateEngine(Engine):
    """Computes the steps of `finetune` with an `Accelerator`.

    Attributes:
        accelerator: as it was given.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        """An engine with an accelerator that has prepared nothing yet.

        Args:
            accelerator: its mixed precision is that of the forward pass; `finetune` accumulates
                gradients itself. Parameters that a loss does not reach need a
                `DistributedDataParallelKwargs(find_unused_parameters=True)` among its handlers, and
                buffers that differ from process to process `broadcast_buffers=False`; see
                `launched`.

        Raises:
            UnsupportedError: if it shards the model.
        """
        if accelerator.distributed_type not in _WHOLE:
            raise UnsupportedError(
                f"accelerate is configured for {accelerator.distributed_type.value}; fine-tuning "
                "keeps the whole model in every process: choose multi-GPU in `accelerate config`"
            )
        self.accelerator = accelerator
        self.index = accelerator.process_index
        self.processes = accelerator.num_processes
        self.device = accelerator.device

    def prepare(self, loss: TaskLoss, optimizer: Optimizer) -> None:
        self._loss, self._optimizer = self.accelerator.prepare(loss, optimizer)

    def release(self) -> None:
        """Lets go of what was prepared."""
        vars(self).pop("_loss", None)
        vars(self).pop("_optimizer", None)

    def gradients(self, batch: Batch, *, share: float, last: bool) -> Mapping[str, Tensor]:
        with nullcontext() if last else self.accelerator.no_sync(self._loss):
            terms: dict[str, Tensor] = self._loss(dict(batch))
            self.accelerator.backward(total(terms) * share)
        return terms

    def step(self, parameters: Iterable[nn.Parameter], clip: float | None) -> Tensor | None:
        norm = None
        if clip is not None:
            norm = self.accelerator.clip_grad_norm_(list(parameters), clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def mean(self, value: Tensor) -> Tensor:
        found: Tensor = self.accelerator.reduce(value, reduction="mean")
        return found

    def state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def restore(self, state: Mapping[str, Any]) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(state))


@contextmanager
def launched(autocast: str | None = None, *, cpu: bool = False) -> Iterator[AccelerateEngine]:
    """The engine of the processes that were launched; the process group ends with the block.

    Args:
        autocast: `bfloat16` or `float16` of forward passes; None takes what `accelerate` was
            configured for.
        cpu: train on the CPU, even if there are GPUs.
    """
    options: dict[str, Any] = {} if autocast is None else {"mixed_precision": _MIXED[autocast]}
    handler = DistributedDataParallelKwargs(
        # Retrieval does not use the decoder; every process has queues of its own.
        find_unused_parameters=True,
        broadcast_buffers=False,
    )
    before_joining()
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[handler], **options)
    engine = AccelerateEngine(accelerator)
    yield engine
    accelerator.wait_for_everyone()  # gloo may abort a process whose peer is still at work
    # What DistributedDataParallel keeps of the process group goes first: freed later, with the
    # interpreter's lock held, it waits for gloo's threads, and they for the lock.
    engine.release()
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
