"""Callbacks for the `Trainer` of transformers: masks that hold, and pruning while it trains.

    Trainer(..., callbacks=[LockCallback(masks)])
    Trainer(..., callbacks=[GradualPruningCallback(sparsity=0.75, score="platon")])

They need `accelerate`, as `Trainer` itself does. In every checkpoint they keep what
`resume_from_checkpoint` needs.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

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
    "resume from another checkpoint, or start again",
)


class _ZerosCallback(TrainerCallback, ABC):
    """Checks the zeros at every checkpoint, which gets a file of its own, and at the end."""

    _file: ClassVar[str]

    def __init__(self, resume_from: str | os.PathLike[str] | None) -> None:
        self._resume_from = resume_from
        self._attached: SparsityLock | GradualPruning | None = None

    @abstractmethod
    def _made(
        self, model: nn.Module, file: Path | None, steps: int
    ) -> SparsityLock | GradualPruning:
        """What keeps the zeros, from the file of the checkpoint that the run resumes from."""

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Writes to the folder of a checkpoint what resuming from it needs."""

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
        """Begins, or resumes from the checkpoint; then attaches to the optimizer.

        Raises:
            VlpError: see `SparsityLock` and `GradualPruning`; if masks are not those of the
                checkpoint, too.
        """
        file = self._resumed(args, state)
        self._attached = self._made(model, file, state.max_steps).attach(optimizer)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Checks the zeros, and writes what resuming needs to the checkpoint.

        Raises:
            MaskError: if something that should be zero by now is not.
        """
        if self._attached is None:
            return
        self._attached.check()
        if not state.is_world_process_zero:
            return
        folder = _checkpoint(args, state)
        if folder.is_dir():
            self._write(folder)
        else:
            _log.warning("no checkpoint at %s; the state of this callback is not saved", folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Checks the zeros, and detaches from the optimizer.

        Raises:
            MaskError: if something is not zero, as after `load_best_model_at_end` with a model from
                before the masks were fixed.
        """
        if self._attached is not None:
            self._attached.check()
            self._attached.detach()

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """Our file in the checkpoint that the run resumes from; None if it resumes from none.

        `Trainer` does not tell its callbacks which one it is.
        """
        if state.global_step == 0:
            return None
        own = _checkpoint(args, state)
        given = args.resume_from_checkpoint
        for folder in (self._resume_from, given if isinstance(given, str) else None, own):
            if folder is not None and (Path(folder) / self._file).is_file():
                return Path(folder) / self._file
        raise MaskError(
            f"training resumes after step {state.global_step}, but there is no {self._file} in "
            f"{own}; give the callback the checkpoint's folder as resume_from, or start again"
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of `Trainer`'s checkpoint of this step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class LockCallback(_ZerosCallback):
    """Keeps the zeros of masks while `Trainer` trains; see `SparsityLock`.

    Masks that bring new values are applied to the model first, unless it resumes. Zeros are checked
    at every checkpoint, which holds the masks too, and at the end.

    Attributes:
        lock: attached; None before the training begins.
    """

    _file = MASKS_FILE

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

    def _made(self, model: nn.Module, file: Path | None, steps: int) -> SparsityLock:
        if file is None:
            self._masks.apply(model, self._adapter)
        elif Masks.load(file) != self._masks:
            raise MaskError(
                f"the masks of the checkpoint ({file}) are others than those of this callback; "
                "give Masks.load of that file, or start again"
            )
        self.lock = SparsityLock(model, self._masks, self._adapter)
        return self.lock

    def _write(self, folder: Path) -> None:
        self._masks.save(folder / MASKS_FILE, overwrite=True)


class GradualPruningCallback(_ZerosCallback):
    """Prunes while `Trainer` trains; see `GradualPruning`.

    The steps are those of the training (`state.max_steps`), so the target is reached at its end
    less the final warm-up. Steps that a gradient scaler leaves out count as `Trainer` counts them.
    Once the masks are the last ones every checkpoint holds them, and zeros are checked then and at
    the end.

    Attributes:
        pruning: from the beginning of the training on; `pruning.masks()` at its end.
    """

    _file = STATE_FILE

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

    def _made(self, model: nn.Module, file: Path | None, steps: int) -> GradualPruning:
        pruning = GradualPruning(model, steps=steps, **self._options)
        if file is not None:
            pruning.load_state_dict(read_artifact(file, _STATE)[0])
        self.pruning = pruning
        return pruning

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Counts a step that the gradient scaler has left out."""
        if self.pruning is not None and self.pruning.step == state.global_step:
            self.pruning.skip_step()

    def _write(self, folder: Path) -> None:
        assert self.pruning is not None
        write_artifact(folder / STATE_FILE, _STATE, self.pruning.state_dict(), {}, state=True)
        if self.pruning.finished:
            self.pruning.masks().save(folder / MASKS_FILE, overwrite=True)
