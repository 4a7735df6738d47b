"""The steps of a fine-tuning, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.finetuning.ahead import ahead
from vlp_plugins.finetuning.engine import Engine
from vlp_plugins.finetuning.epochs import Epochs, Group, made
from vlp_plugins.finetuning.files import Place, seed_of
from vlp_plugins.finetuning.loss_log import LossLog
from vlp_plugins.finetuning.optimizing import set_rate
from vlp_plugins.finetuning.settings import FinetuneSettings
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.models.adapter import Batch


@dataclass(frozen=True)
class Steps:
    """Takes the steps of a run.

    Attributes:
        model: being trained.
        optimizer: torch's own.
        engine: has prepared both.
        lock: of the masks; None without masks.
        settings: of the run.
        steps: how many there are in all.
        log: of the losses.
        workers: threads that make batches ahead.
    """

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
        for (epoch, number, _), mine in ahead(groups, self._mine, self.workers):
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

    def _mine(self, found: tuple[int, int, Group]) -> dict[int, Batch]:
        """The batches of a group that this process computes, by their numbers in it."""
        group, engine = found[2], self.engine
        return {n: made(group[n]) for n in range(engine.index, len(group), engine.processes)}

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
