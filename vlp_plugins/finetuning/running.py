"""Fine-tunes a model on a task; what masks remove stays zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.finetuning.engine import Engine, OneDevice, TaskLoss
from vlp_plugins.finetuning.epochs import Batches, Epochs
from vlp_plugins.finetuning.files import Place, StateFile, digest_of
from vlp_plugins.finetuning.loss_log import LossLog
from vlp_plugins.finetuning.optimizing import build_optimizer, trained
from vlp_plugins.finetuning.settings import FinetuneSettings
from vlp_plugins.finetuning.stepping import Steps
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import RecipeError
from vlp_plugins.runtime.model_state import flags_kept, random_state_kept, takes_model


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
        model: what `downstream` returns; wherever it shall be trained, in float32.
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
        resume: go on from the state in the workplace; the result has the same bits as if the run
            had not been interrupted.
        checkpoint_every: steps from one state to the next.
        log_every: steps that a line of the log is the mean of.
        workers: threads that make batches ahead, if those are functions; see `ahead`.
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
        RecipeError: if nobody knows how many steps there are.
    """
    settings = settings or FinetuneSettings()
    trained(model)
    engine = engine or OneDevice(next(model.parameters()).device, settings.autocast)
    epochs = Epochs(batches, settings.accumulate * engine.processes, seed=settings.seed)
    steps = settings.steps or settings.epochs * _known(epochs.steps())
    if masks is not None:
        masks.apply(model, adapter)
        _refresh_followers(model, adapter)
    optimizer = build_optimizer(model, settings)
    engine.prepare(TaskLoss(model, adapter, task), optimizer)
    identity = _identity(model, adapter, task, masks, settings, steps, engine)
    state = StateFile(workplace, identity | dict(about or {}))
    log = LossLog(workplace)
    locked = (
        nullcontext() if masks is None
        else SparsityLock(model, masks, adapter).attach(optimizer)
    )  # fmt: skip
    with locked as lock, _training(model, engine.device):
        place = None
        if resume:
            place = state.load(model, optimizer, engine, adapter.loss_state(model))
        place = place or Place()
        if engine.index == 0:
            log.begin(place.step)
        run = Steps(model, optimizer, engine, lock, settings, steps, log, workers)
        for now in run.after(place, epochs, log_every, checkpoint_every):
            if progress is not None:
                progress(now.step, steps)
            if workplace is not None and now.step % checkpoint_every == 0 and now.step < steps:
                if lock is not None:
                    lock.check()
                state.save(model, optimizer, engine, now, adapter.loss_state(model))
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
    """What a run must have in common with the one that it goes on from."""
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
