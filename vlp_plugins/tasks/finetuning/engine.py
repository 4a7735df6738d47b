"""Where a step of fine-tuning is computed: on one device, or by several processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlp_plugins.calibration.loss import total
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.runtime.model_state import autocast_of, precision


class TaskLoss(nn.Module):
    """A model whose forward is the loss of a task, so that wrappers of models can wrap that."""

    def __init__(self, model: nn.Module, adapter: Adapter, task: str) -> None:
        super().__init__()
        self.model = model
        self._adapter = adapter
        self._task = task

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss of a batch, by name."""
        return self._adapter.task_losses(self._task, self.model, batch)


class Engine:
    """Computes gradients and takes steps: here in one process, on one device.

    Attributes:
        index: of this process, from 0.
        processes: how many there are; each computes other batches of a step.
    """

    index = 0
    processes = 1
    device: torch.device

    def __init__(self, device: torch.device | str, autocast: str | None = None) -> None:
        """Chooses where, and in which precision of forward passes; float16 scales the loss.

        Raises:
            UnsupportedError: if the precision is unknown.
        """
        self.device = torch.device(device)
        self._dtype = autocast_of(autocast)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._dtype is torch.float16)

    def prepare(self, loss: TaskLoss, optimizer: Optimizer) -> None:
        """Takes what is trained; parameters stay the same objects."""
        self._loss, self._optimizer = loss, optimizer

    def gradients(self, batch: Batch, *, share: float, last: bool) -> Mapping[str, Tensor]:
        """Adds gradients of a batch, with its share of the loss, to those that are there.

        After the last batch of a step gradients of all processes are averaged.

        Returns:
            The terms of the loss, by name.
        """
        with precision(self.device, self._dtype):
            terms: dict[str, Tensor] = self._loss(batch)
        self._scaler.scale(total(terms) * share).backward()
        return terms

    def step(self, parameters: Iterable[nn.Parameter], clip: float | None) -> Tensor | None:
        """Takes a step with the gradients, and deletes them.

        Returns:
            Norm of the gradient before it was clipped, if it was to be.
        """
        norm = None
        if clip is not None:
            self._scaler.unscale_(self._optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return norm

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        return value

    def state(self) -> dict[str, Any]:
        """What else than model and optimizer the next step depends on, as JSON."""
        return dict(self._scaler.state_dict())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self._scaler.load_state_dict(dict(state))
