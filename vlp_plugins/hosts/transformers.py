"""Callbacks for the `Trainer` of transformers: masks that hold, and pruning while it trains.

    Trainer(..., callbacks=[LockCallback(masks)])
    Trainer(..., callbacks=[GradualPruningCallback(sparsity=0.75, score="platon")])

They need what `Trainer` itself needs, `accelerate`. Beside every checkpoint they keep what
`resume_from_checkpoint` needs.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.gradual.pruning import GradualPruning
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.request import Target
from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.errors import MaskError, UnsupportedError

_log = logging.getLogger(__name__)

MASKS_FILE = "vlp_masks.safetensors"
STATE_FILE = "vlp_gradual_pruning.safetensors"
_STATE = Format(
    "state of gradual pruning",
    "vlp_gradual",
    1,
    MaskError,
    "resume from another checkpoint, or start anew",
)


class _Saving(TrainerCallback):
    """What both callbacks do about checkpoints."""

    def __init__(self, resume_from: str | os.PathLike[str] | None) -> None:
        self._resume_from = resume_from

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """The folder that `Trainer` has just written; None if it is nowhere to be found."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folder = Path(args.output_dir) / name
        if folder.is_dir():
            return folder
        _log.warning("no checkpoint at %s; what this callback knows is not saved", folder)
        return None

    def _resumed(self, args: TrainingArguments, state: TrainerState, name: str) -> Path | None:
        """Our file in the checkpoint that the run goes on from; None if it starts anew.

        `Trainer` does not tell its callbacks which one it is.
        """
        if state.global_step == 0:
            return None
        own = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        given = args.resume_from_checkpoint
        for folder in (self._resume_from, given if isinstance(given, str) else None, own):
            if folder is not None and (Path(folder) / name).is_file():
                return Path(folder) / name
        raise MaskError(
            f"training goes on after step {state.global_step}, but there is no {name} in {own}; "
            "give the callback the checkpoint's folder as resume_from, or start anew"
        )


class LockCallback(_Saving):
    """Keeps the zeros of masks while `Trainer` trains; see `SparsityLock`.

    Masks that bring new values are applied to the model first, if it starts anew. Zeros are checked
    at every checkpoint and at the end, and the masks lie beside every checkpoint.
    """

    def __init__(
        self,
        masks: Masks,
        adapter: Adapter | None = None,
        *,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        """Nothing is done before the training begins.

        Args:
            masks: made for the model, or for the pre-training model of its family.
            adapter: see `Masks.apply`.
            resume_from: the checkpoint, where it is not in `output_dir`.
        """
        super().__init__(resume_from)
        self._masks, self._adapter = masks, adapter
        self.lock: SparsityLock | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Applies the masks and attaches the lock.

        Raises:
            MaskError: if they do not fit the model, or are not those of the checkpoint.
        """
        file = self._resumed(args, state, MASKS_FILE)
        if file is None:
            self._masks.apply(model, self._adapter)
        elif Masks.load(file) != self._masks:
            raise MaskError(
                f"the masks of the checkpoint ({file}) are others than those of this callback; "
                "give Masks.load of that file, or start anew"
            )
        self.lock = SparsityLock(model, self._masks, self._adapter).attach(optimizer)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Writes the masks beside the checkpoint.

        Raises:
            MaskError: if a zero is none.
        """
        self._check()
        folder = self._checkpoint(args, state) if state.is_world_process_zero else None
        if folder is not None:
            self._masks.save(folder / MASKS_FILE, overwrite=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Checks the zeros and lets go.

        Raises:
            MaskError: if a zero is none.
        """
        self._check()
        if self.lock is not None:
            self.lock.detach()

    def _check(self) -> None:
        if self.lock is not None:
            self.lock.check()


class GradualPruningCallback(_Saving):
    """Prunes while `Trainer` trains; see `GradualPruning`.

    The steps are those of the training (`state.max_steps`), so the target is reached at its end
    less the final warm-up. Steps that a gradient scaler leaves out count as `Trainer` counts them.
    Once the masks are the last ones they lie beside every checkpoint, and zeros are checked then
    and at the end.

    Attributes:
        pruning: from the beginning of the training on; `pruning.masks()` at its end.
    """

    def __init__(
        self,
        *,
        sparsity: Target,
        resume_from: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """Nothing is done before the training begins.

        Args:
            sparsity: fraction removed at the end.
            resume_from: the checkpoint, where it is not in `output_dir`.
            options: of `GradualPruning`, all but the steps.
        """
        super().__init__(resume_from)
        if "steps" in options:
            raise UnsupportedError("the steps are those of the training; leave them out")
        self._options = {"sparsity": sparsity, **options}
        self.pruning: GradualPruning | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Begins, or goes on from the checkpoint.

        Raises:
            VlpError: see `GradualPruning`.
        """
        pruning = GradualPruning(model, steps=state.max_steps, **self._options)
        if (file := self._resumed(args, state, STATE_FILE)) is not None:
            pruning.load_state_dict(read_artifact(file, _STATE)[0])
        self.pruning = pruning.attach(optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Counts a step that the gradient scaler has left out."""
        if self.pruning is not None and self.pruning.step == state.global_step:
            self.pruning.skip_step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Writes the state, and the masks if they are the last ones, beside the checkpoint.

        Raises:
            MaskError: if something that shall be zero by now is not.
        """
        if self.pruning is None:
            return
        self.pruning.check()
        folder = self._checkpoint(args, state) if state.is_world_process_zero else None
        if folder is None:
            return
        write_artifact(folder / STATE_FILE, _STATE, self.pruning.state_dict(), {}, state=True)
        if self.pruning.finished:
            self.pruning.masks().save(folder / MASKS_FILE, overwrite=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Checks the zeros and lets go.

        Raises:
            MaskError: if something is not zero, as after `load_best_model_at_end` with a model from
                before the masks were fixed.
        """
        if self.pruning is None:
            return
        self.pruning.check()
        self.pruning.detach()
