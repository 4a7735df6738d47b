"""finetune(): trains a model on a task; what masks remove stays zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.saving import REBUILT
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.checkpoint import Checkpoint
from vlp_plugins.runtime.distributed import all_gather
from vlp_plugins.runtime.errors import RecipeError, UnsupportedError, suggest
from vlp_plugins.runtime.model_state import flags_kept, random_state_kept, takes_model
from vlp_plugins.runtime.offload import check_resident
from vlp_plugins.runtime.parallel import ahead
from vlp_plugins.tasks import TASKS
from vlp_plugins.tasks.finetuning.engine import Engine, TaskLoss
from vlp_plugins.tasks.finetuning.files import (
    FORM,
    STATE_FILE,
    LossLog,
    Place,
    digest_of,
    own_buffers,
    restore,
    seed_of,
    state_of,
)
from vlp_plugins.tasks.finetuning.samples import Batches, Epochs, Group, made
from vlp_plugins.tasks.finetuning.settings import (
    FinetuneSettings,
    build_optimizer,
    set_rate,
    trained,
)


@takes_model
def downstream(
    model: nn.Module,
    adapter: Adapter,
    task: str,
    *,
    tokenizer: Any | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model of a task with the weights of a pre-training model, which masks of that model fit.

    Args:
        model: of pre-training, which is not changed, or of the task already. It is returned
            itself if it can be trained on the task as it is.
        adapter: claims the model.
        task: one of `TASKS`.
        tokenizer: of the texts; X-VLM's decoders must know how they begin and end.
        classes: how many a classifier has.
        seed: for what the task adds, which is drawn at random; the global random state is left as
            it was.

    Raises:
        UnsupportedError: if the task is unknown, or the model cannot be fine-tuned on it.
    """
    if task not in TASKS:
        raise UnsupportedError(f"unknown task {task!r}{suggest(task, list(TASKS))}")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            return adapter.downstream_model(task, model, tokenizer=tokenizer, classes=classes)
        except RuntimeError as error:  # tensors of other shapes than the configuration says
            if getattr(model, REBUILT, False):
                raise UnsupportedError(
                    f"heads or units were cut out of this {type(model).__name__}; make the model "
                    f"of {task} of the dense one, and cut that"
                ) from error
            raise


@dataclass(frozen=True)
class _Steps:
    """Takes the steps of a run; the engine has prepared model and optimizer."""

    model: nn.Module
    optimizer: Optimizer
    engine: Engine
    lock: SparsityLock | None
    settings: FinetuneSettings
    steps: int
    log: LossLog
    workers: int

    def after(
        self, place: Place, epochs: Epochs, log_every: int, checkpoint_every: int
    ) -> Iterator[Place]:
        """Takes the steps that are left; yields where the run stands after each."""
        groups = islice(epochs.from_place(place.epoch, place.group), self.steps - place.step)
        for epoch, number, mine in ahead(self._mine, groups, self.workers):
            rate = set_rate(self.optimizer, self.settings, place.step, self.steps)
            norm = self._take(mine, place.step)
            place = Place(place.step + 1, epoch, number + 1)
            if any(place.step % every == 0 for every in (log_every, checkpoint_every)) or (
                place.step == self.steps
            ):
                facts: dict[str, Any] = {"epoch": epoch, "learning_rate": rate}
                if norm is not None:
                    facts["gradient_norm"] = float(norm)
                writes = self.engine.index == 0
                self.log.write(place.step, self.engine.mean, writes=writes, **facts)
            yield place

    def _mine(self, found: tuple[int, int, Group]) -> tuple[int, int, dict[int, Batch]]:
        """Epoch and group, and the batches of it that this process computes, by their numbers."""
        (epoch, number, group), engine = found, self.engine
        mine = range(engine.index, len(group), engine.processes)
        return epoch, number, {n: made(group[n]) for n in mine}

    def _take(self, mine: Mapping[int, Batch], step: int) -> Tensor | None:
        engine = self.engine
        for turn, (number, batch) in enumerate(mine.items(), 1):
            torch.manual_seed(seed_of(self.settings.seed, step, number))
            there = to_device(batch, engine.device)
            terms = engine.gradients(there, share=1 / len(mine), last=turn == len(mine))
            self.log.add(terms)
        if self.lock is not None and engine.processes > 1:  # averaging may have brought them back
            self.lock.mask_gradients()
        return engine.step(self.model.parameters(), self.settings.clip)


@dataclass(frozen=True)
class Finetuned:
    """What a run did.

    Attributes:
        steps: of the optimizer, those of an interrupted run included.
        resumed_from: step that this run began at; 0 if it was not resumed.
        log: lines of the loss log; see `LossLog`.
    """

    steps: int
    resumed_from: int
    log: tuple[Mapping[str, Any], ...]


@takes_model
def finetune(
    model: nn.Module,
    adapter: Adapter,
    batches: Batches,
    *,
    task: str,
    masks: Masks | None = None,
    settings: FinetuneSettings | None = None,
    engine: Engine | None = None,
    workplace: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    log_every: int = 10,
    workers: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Finetuned:
    """Trains a model in place by AdamW on the loss of a task, with the masks locked.

    A step takes `settings.accumulate` batches of every process, and averages their losses: two
    processes do what one does that accumulates twice as many, with the same dropout. Training flags
    and the random state are as before afterwards.

    Args:
        model: what `downstream` returns; on the device where it is trained, in float32.
        adapter: claims the model; knows the loss of the task.
        batches: tensors, for instance of captions and their images; see `Batches`. All processes
            get the same, and each computes its own. A loader may shuffle (its order depends on
            `settings.seed` and the epoch); what it draws for each batch, such as random crops, is
            other after a resume, unless it draws in worker processes.
        task: see `downstream`.
        masks: of this model or of the pre-training model; they are applied first (new values of
            methods that bring some included), and hold at every step. None trains all weights.
        settings: of the optimizer and its rate.
        engine: computes the steps; None: in this process, on the model's device.
        workplace: folder for the state and the loss log `losses.jsonl`; None keeps neither.
        resume: continue from the state in the workplace; the result has the same bits as if the run
            had not been interrupted.
        checkpoint_every: steps from one state to the next.
        log_every: steps that a line of the log is the mean of.
        workers: threads that prefetch batches, if those are functions; see `ahead`.
        about: what else a resumed run must have in common with the interrupted one, in values of
            JSON: the data, the size of its batches.
        progress: called with steps done and steps in all.

    Returns:
        What was done.

    Raises:
        MaskError: if the masks do not fit, or a removed weight is not zero at the end or when the
            state is to be saved.
        NonFiniteError: if the loss becomes NaN or infinite.
        UnsupportedError: if the model is of another task, or not in float32.
        DataError: if there are too few batches, or the state is of another run.
        RecipeError: if the number of steps is unknown.
    """
    settings = settings or FinetuneSettings()
    check_resident(model, "training")
    trained(model)
    engine = engine or Engine(next(model.parameters()).device, settings.autocast)
    epochs = Epochs(batches, settings.accumulate * engine.processes, seed=settings.seed)
    steps = settings.steps or settings.epochs * _known(epochs.steps())
    if masks is not None:
        masks.apply(model, adapter)
        _refresh_followers(model, adapter)
    optimizer = build_optimizer(model, settings)
    engine.prepare(TaskLoss(model, adapter, task), optimizer)
    identity = _identity(model, adapter, task, masks, settings, steps, engine)
    path = None if workplace is None else workplace / STATE_FILE
    file = Checkpoint(path, FORM, identity | dict(about or {}), unit="step")
    log = LossLog(workplace)
    locked = (
        nullcontext() if masks is None
        else SparsityLock(model, masks, adapter).attach(optimizer)
    )  # fmt: skip
    with locked as lock, _training(model, engine.device):
        place = None
        if resume:
            place = file.load(
                lambda tensors, content: restore(
                    tensors, content, model, optimizer, engine, adapter.loss_state(model)
                )
            )
        place = place or Place()
        if engine.index == 0:
            log.begin(place.step)
        run = _Steps(model, optimizer, engine, lock, settings, steps, log, workers)
        for now in run.after(place, epochs, log_every, checkpoint_every):
            if progress is not None:
                progress(now.step, steps)
            if workplace is not None and now.step % checkpoint_every == 0 and now.step < steps:
                if lock is not None:
                    lock.check()
                own = own_buffers(model, adapter.loss_state(model))
                each = all_gather({name: buffer.cpu() for name, buffer in own.items()})
                file.save(partial(state_of, model, optimizer, engine, now, each))
        if lock is not None:
            lock.check()
    return Finetuned(steps, place.step, tuple(log.lines))


@contextmanager
def _training(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode; flags and random state are as before afterwards."""
    with flags_kept(model), random_state_kept(device):
        model.train()
        yield


@torch.no_grad()
def _refresh_followers(model: nn.Module, adapter: Adapter) -> None:
    """Makes momentum twins copies of what they follow, which masks have changed."""
    for path, twin in adapter.followers(model).items():
        online, slow = model.get_submodule(path), model.get_submodule(twin)
        for parameter, fast in zip(slow.parameters(), online.parameters(), strict=True):
            parameter.copy_(fast)


def _identity(
    model: nn.Module,
    adapter: Adapter,
    task: str,
    masks: Masks | None,
    settings: FinetuneSettings,
    steps: int,
    engine: Engine,
) -> dict[str, Any]:
    """What a run must have in common with the one that it resumes."""
    return {
        "task": task,
        "adapter": adapter.name,
        "structure": WeightMap.of(model, adapter).structure,
        "masks": digest_of(masks),
        "number of steps": steps,
        "number of processes": engine.processes,
        **settings.as_dict(),
    }


def _known(steps: int | None) -> int:
    if steps is None:
        raise RecipeError(
            "the batches do not say how many they are, so an epoch has no known length; give the "
            "number of steps (settings.steps, --steps)"
        )
    return steps
