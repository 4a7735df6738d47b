"""NNI's evaluators for transformers and Lightning, adapted to today's versions of them.

NNI 3.0 was written for transformers 4.2x and Lightning 1.x; under transformers 5 its evaluator
fails to make the optimizer, to count steps and to patch the loss, and under Lightning 2 it cannot
limit the steps.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nni
import torch
from nni.common import is_traceable
from nni.compression.utils import LightningEvaluator as _Lightning
from nni.compression.utils import TransformersEvaluator as _Transformers
from torch import nn
from transformers import TrainerCallback

Task = Callable[[], object]


class _Steps(TrainerCallback):
    """Runs tasks around every step of the optimizer, however many batches a step accumulates."""

    def __init__(
        self, evaluator: TransformersEvaluator, before: Sequence[Task], after: Sequence[Task]
    ) -> None:
        self._evaluator, self.before, self.after = evaluator, before, after

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for task in self.before:
            task()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for task in self.after:
            task()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._evaluator._replay(self, state.global_step)


class TransformersEvaluator(_Transformers):
    """NNI's `TransformersEvaluator` for transformers 5, with accumulation and resuming.

    Checkpoints of the trainer hold masks and dense weights of the wrapped model. To resume, make
    model, pruner and evaluator as before and give `resume_from_checkpoint`; schedules continue
    from there.

    Attributes:
        replaying: true while schedules count the steps before a checkpoint.
    """

    def __init__(
        self,
        trainer: Any,
        dummy_input: Any | None = None,
        *,
        resume_from_checkpoint: str | bool | None = None,
    ) -> None:
        """Takes a trainer made by `nni.trace(Trainer)(...)`.

        `resume_from_checkpoint` is as `Trainer.train` takes it.
        """
        super().__init__(trainer, dummy_input)
        self.replaying = False
        self._resume = resume_from_checkpoint
        self._steps: list[_Steps] = []

    def _init_optimizer_helpers(self, pure_model: nn.Module) -> None:
        trainer = self.traced_trainer
        if trainer.optimizer is None or not is_traceable(trainer.optimizer):
            trainer.optimizer = None
            kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
            trainer.optimizer_cls_and_kwargs = (nni.trace(kind), options)
            trainer.create_optimizer()
        super()._init_optimizer_helpers(pure_model)

    def patch_optimizer_step(
        self, before_step_tasks: Sequence[Task], after_step_tasks: Sequence[Task]
    ) -> None:
        """Runs tasks around every optimizer step of the bound trainer."""
        self._steps.append(_Steps(self, before_step_tasks, after_step_tasks))
        self.trainer.add_callback(self._steps[-1])

    def revert_optimizer_step(self) -> None:
        """Removes all these tasks."""
        for steps in self._steps:
            self.trainer.remove_callback(steps)
        self._steps.clear()

    def patch_loss(self, patch: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        """Lets every loss of the bound trainer pass through `patch(loss, inputs)`."""
        compute = self.trainer.compute_loss

        def patched(
            _: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any
        ) -> Any:
            found = compute(model, inputs, return_outputs=return_outputs, **options)
            if return_outputs:
                return patch(found[0], inputs), *found[1:]
            return patch(found, inputs)

        self.trainer.compute_loss = types.MethodType(patched, self.trainer)

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Trains the bound model up to a limit, from the checkpoint on if there is one."""
        arguments = self.trainer.args
        limits = arguments.max_steps, arguments.num_train_epochs
        if max_epochs is not None:
            arguments.num_train_epochs = max_epochs
            arguments.max_steps = -1
        if max_steps is not None:
            arguments.max_steps = max_steps
        helper = self._lr_scheduler_helper
        self.trainer.lr_scheduler = helper.call(self.trainer.optimizer) if helper else None
        try:
            self.trainer.train(resume_from_checkpoint=self._resume)
        finally:
            self.trainer.lr_scheduler = None
            arguments.max_steps, arguments.num_train_epochs = limits

    def _replay(self, first: _Steps, steps: int) -> None:
        """Lets all tasks count the steps before a checkpoint, once, and keeps its masks."""
        if not steps or not self._steps or first is not self._steps[0]:
            return
        with _same_masks(self.trainer.model):
            self.replaying = True
            try:
                for _ in range(steps):
                    for each in self._steps:
                        for task in (*each.before, *each.after):
                            task()
            finally:
                self.replaying = False


class LightningEvaluator(_Lightning):
    """NNI's `LightningEvaluator` for Lightning 2, whose loop takes `max_steps` elsewhere."""

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Trains the bound model up to a limit; without one as the trainer says."""
        trainer = self.trainer.trace_copy().get()
        trainer.num_sanity_val_steps = 0
        if max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = max_steps
            trainer.fit_loop.max_epochs = -1
        if max_epochs is not None:
            trainer.fit_loop.max_epochs = max_epochs
        trainer.fit(self.model, self.data_module)
        self.model.trainer = None


@contextmanager
def _same_masks(model: nn.Module) -> Iterator[None]:
    """Restores the masks of all wrappers at the end of the block."""
    kept = {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if "_nni_wrapper." in name and name.endswith("_mask")
    }
    yield
    with torch.no_grad():
        for name, mask in kept.items():
            model.get_buffer(name).copy_(mask)
