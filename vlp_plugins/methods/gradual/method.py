"""The methods `platon` and `taylor`: a training loop for pruning alone, with rising masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import nn

from vlp_plugins.calibration.loss import (
    LossProbe,
    bytes_of_state,
    loss_state_kept,
    write_state,
)
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.gradual.rising_masks import Rise, RisingMasks, Timetable, default_warmup
from vlp_plugins.methods.gradual.scores import BETA1, BETA2, Platon, Taylor, TrainingScore
from vlp_plugins.methods.gradual.state import dump, restore
from vlp_plugins.methods.method import Context, Cost
from vlp_plugins.methods.rounds import FreshBatches, RecordedBatches, Stepwise
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.request import Target
from vlp_plugins.models.saving import restored
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import Format
from vlp_plugins.runtime.checkpoint import Checkpoint, pack_moments, restore_moments, state_tensor
from vlp_plugins.runtime.distributed import broadcast
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.sharding import write, zero_outside
from vlp_plugins.runtime.untrusted import read_as
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation
from vlp_plugins.scoring.factors import Factors, guided_name
from vlp_plugins.scoring.schedules import schedule_by_name


class Masters:
    """Parameters in float32; a model in bfloat16 would lose most small steps.

    Those of float32 weights are the weights themselves, with gradients of their own.

    Attributes:
        weights: as those of the model, with the masters for parameters.
    """

    def __init__(self, weights: WeightMap) -> None:
        """Copies what is not float32."""
        self._model = weights
        self.weights = WeightMap(
            {
                name: replace(weight, parameter=nn.Parameter(weight.parameter.detach().float()))
                for name, weight in weights.items()
            },
            weights.adapter_name,
            weights.adapter_settings,
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The masters by canonical name."""
        masters: dict[str, Any] = {name: each.parameter for name, each in self.weights.items()}
        return masters

    def write(self) -> None:
        """Gives the model the masters' values, in its dtype."""
        for name, weight in self._model.items():
            if weight.parameter.dtype != torch.float32:
                write(weight.parameter, self.weights[name].parameter)


class Training:
    """Weights, their optimizer and their masks.

    Attributes:
        masters: what is trained.
        rising: their masks, which count the steps.
        optimizer: AdamW, of the prunable weights alone: masks hold nothing else.
    """

    def __init__(self, masters: Masters, rising: RisingMasks, lr: float) -> None:
        """Starts with fresh moments; the learning rate falls linearly from `lr` to zero."""
        self.masters = masters
        self.rising = rising
        self._lr = lr
        # PyTorch's defaults: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
        self.optimizer = torch.optim.AdamW(masters.parameters.values(), lr=lr)

    def run(
        self,
        probe: LossProbe,
        batches: Iterable[Batch],
        stepped: Callable[[int], None],
    ) -> None:
        """A step with every batch.

        Args:
            probe: attached to the model.
            batches: those from the next step on.
            stepped: called after every step with the number of steps done.
        """
        for batch in batches:
            gradients = probe.measure(batch, self.rising.step)
            if gradients is not None:  # else the batch was left out, which costs a step
                self._step(gradients)
            chosen = self.rising.advance()
            if chosen or self.rising.held:
                self._zero()
            self.masters.write()
            stepped(self.rising.step)

    def _step(self, gradients: dict[str, torch.Tensor]) -> None:
        self.rising.observe(gradients)
        for name, master in self.masters.parameters.items():
            master.grad = gradients.get(name)
            if master.grad is not None and self.rising.held:
                zero_outside(master.grad, self.rising.keep[name])
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * (1 - self.rising.step / self.rising.rise.timetable.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _zero(self) -> None:
        for name, master in self.masters.parameters.items():
            zero_outside(master, self.rising.keep[name])


_FORM = Format(
    "checkpoint", "vlp_training", 2, DataError, "delete it and train from the first step"
)
_RISING, _MASTER, _STATE = "rising|", "master|", "state|"


def pack_training(
    training: Training, state: Iterable[torch.Tensor], seen: RecordedBatches
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A training after some steps, as a checkpoint keeps it.

    Args:
        training: after some steps.
        state: what the losses have changed; see `Adapter.loss_state`.
        seen: the batches so far.
    """
    tensors = {f"{_RISING}{key}": value for key, value in dump(training.rising).items()}
    masters = training.masters.parameters
    tensors |= {f"{_MASTER}{name}": master.detach() for name, master in masters.items()}
    tensors |= pack_moments(training.optimizer, masters)
    tensors |= {f"{_STATE}{index}": tensor for index, tensor in enumerate(state)}
    return tensors, {"digest": seen.digest, "sizes": seen.sizes}


def restore_training(
    training: Training, tensors: dict[str, torch.Tensor], losses: Iterable[torch.Tensor]
) -> list[torch.Tensor]:
    """Brings a training to where `pack_training` found it; returns the state of the losses.

    Raises:
        KeyError: if something is missing.
        ValueError: if a tensor has another shape than that of the training, or of `losses`.
        MaskError: if the masks are damaged.
    """
    rising = {k: v for k, v in tensors.items() if k.startswith(_RISING)}
    restore(training.rising, {k.removeprefix(_RISING): v for k, v in rising.items()})
    with torch.no_grad():
        for name, master in training.masters.parameters.items():
            master.copy_(state_tensor(tensors, f"{_MASTER}{name}", master))
    restore_moments(training.optimizer, training.masters.parameters, tensors)
    training.masters.write()
    return [state_tensor(tensors, f"{_STATE}{index}", mine) for index, mine in enumerate(losses)]


LEARNING_RATE = 3e-4
"""That of BLIP's pre-training. On the demo BLIP, with 48 steps, ten times as much is better at 90%
and worse at 75%."""
CHECKPOINTS = 8
"""How often a run is saved: each checkpoint is several times the model's size."""


@dataclass(frozen=True)
class PruningWhileTraining(Stepwise):
    """Trains the weights with the pre-training loss and removes more and more of them.

    Wang et al., "Exploring Intrinsic Dimension for Vision-Language Model Pruning" (ICML 2024),
    prune so while they fine-tune; here it is a method with a fixed budget of steps on the
    calibration batches, and the masks bring the new values of what they keep. Only prunable weights
    are trained, so that masks and values are all there is to it; the model runs in evaluation mode,
    as dropout adds noise that few steps cannot average out.

    In a training of your own use `GradualPruning`, or `GradualPruningCallback` with `Trainer`.

    The published variant computes the losses as the published MULTIFLOW code does; the papers'
    own loops are trainings of downstream models, which are not reproduced here.

    Attributes:
        score: ranks what is removed.
        steps: number of steps, one batch each; None: one per batch of the data.
        lr: learning rate of the first step; it falls to zero on a straight line.
        warmup: fractions of the steps before the first choice of masks and after the last; None: a
            twentieth and a quarter.
        every: steps from one choice to the next. Trainings of many steps take 10; for the few steps
            here fewer are better (48 on the demo BLIP: 1, 4 and 8 for PLATON, 1 and 4 for Taylor).
        revive: whether removed weights may come back; see `GradualPruning`.
        schedule: how the sparsity rises.
        allocation: how many elements each tensor keeps.
        factors: what multiplies the scores that tensors are compared by; None: nothing.
    """

    changes_weights: ClassVar[bool] = True

    score: TrainingScore
    steps: int | None = None
    lr: float = LEARNING_RATE
    warmup: tuple[float, float] | None = None
    every: int = 1
    revive: bool = True
    schedule: str = "cubic"
    allocation: Allocation = field(default_factory=GlobalAllocation)
    factors: Factors | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UnsupportedError(f"every={self.every}; use 1 or more")
        warmup = (0.0, 0.0) if self.warmup is None else self.warmup
        if len(warmup) != 2 or not all(0 <= part < 1 for part in warmup):
            raise UnsupportedError(f"warmup={warmup}; both are fractions of the steps, in [0, 1)")
        schedule_by_name(self.schedule)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Of the score; `id*` before it with factors."""
        return self.score.name if self.factors is None else guided_name(self.score.name)

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        return {
            **self.score.parameters,
            "steps": self.steps,
            "lr": self.lr,
            "warmup": self.warmup,
            "every": self.every,
            "revive": self.revive,
            "schedule": self.schedule,
            **({} if self.factors is None else self.factors.record()),
        }

    def cost(self, context: Context) -> Cost:
        for target in context.targets:
            self._rise(context, target)  # says what cannot be
        runs, size = len(context.targets), context.weights.numel
        stored = context.weights.stored_bytes
        copies = stored + (4 * size if stored < 4 * size else 0)  # masters of half precision
        state = bytes_of_state(context.model, context.adapter)
        # Gradients, two moments, the samples of a window and one in the making.
        tensors = 5 + len(self.score.remembers)
        saved = 4 * (3 + 1 + len(self.score.remembers)) * size + state
        return self._cost(
            context,
            ram_bytes=copies + 2 * state + (4 * tensors + 1) * size,
            disk_bytes=0 if context.workplace is None else saved * runs,
            every=self.every,
        )

    def _rise(self, context: Context, target: Target) -> Rise:
        steps = self._steps(context)
        before, after = default_warmup(steps)
        if self.warmup is not None:
            before, after = (int(part * steps) for part in self.warmup)
        times = Timetable(steps, before, after, self.every, self.schedule)
        return Rise(
            self.score, target, times, self.allocation, context.floor, self.revive, self.factors
        )

    def _masks(self, context: Context, target: Target, batches: FreshBatches, number: int) -> Masks:
        rise = self._rise(context, target)
        steps = rise.timetable.steps
        dense = context.weights.content_hash()
        identity = {
            "method": self.name,
            **rise.record(),
            "lr": self.lr,
            "target": target,
            "seed": context.seed,
            **context.identity(dense),
        }
        file = Checkpoint.of_run(context.workplace, "training", _FORM, identity, unit="step")
        batches.restart()
        seen = RecordedBatches(lambda: batches.take(steps))
        probe = context.loss_probe()

        def stepped(done: int) -> None:
            due = done % max(1, steps // CHECKPOINTS) == 0 or done == steps
            if due:
                state = context.adapter.loss_state(context.model)
                file.save(lambda: pack_training(training, state, seen))
            self._report(context, number, done)

        with (
            torch.inference_mode(False),
            restored(context.weights),
            loss_state_kept(context.model, context.adapter),
            probe.attached(keep_state=True),
        ):
            masters = Masters(context.weights)
            training = Training(masters, RisingMasks(masters.weights, rise), self.lr)
            stream = seen()
            if context.resume:
                self._resume(context, file, training, stream, seen)
            training.run(probe, stream, stepped)
            masks = training.rising.masks(
                weights_hash=dense,
                parameters={**rise.record(), "lr": self.lr, "variant": context.variant},
                seed=context.seed,
                calibration=seen.calibration(),
                values={name: m.detach() for name, m in masters.parameters.items()},
            )
            return broadcast(masks)

    def _resume(
        self,
        context: Context,
        file: Checkpoint,
        training: Training,
        stream: Iterator[Batch],
        seen: RecordedBatches,
    ) -> None:
        """Brings training, model and stream to where the file stands."""
        found = file.load(
            lambda tensors, content: (
                restore_training(training, tensors, context.adapter.loss_state(context.model)),
                read_as(str, content["digest"], "digest"),
                len(read_as(list[int], content["sizes"], "sizes")),
            )
        )
        if found is None:
            return
        state, digest, count = found
        for _ in islice(stream, count):
            pass
        if seen.digest != digest:
            raise DataError(
                f"the first {count} batches are not those that checkpoint {file.path} has "
                "seen; give the same data in the same order, or delete the checkpoint and start "
                "again"
            )
        write_state(context.model, context.adapter, state)


TAYLOR_EVERY = 4
"""Its samples are averaged from one choice to the next; PLATON smooths over all steps anyway."""


def platon(
    *,
    steps: int | None = None,
    lr: float = LEARNING_RATE,
    warmup: tuple[float, float] | None = None,
    every: int = 1,
    revive: bool = True,
    schedule: str = "cubic",
    beta1: float = BETA1,
    beta2: float = BETA2,
) -> PruningWhileTraining:
    """PLATON (Zhang et al., ICML 2022): train, and remove by sensitivity times uncertainty.

    The model is trained with the pre-training loss on the calibration batches, and more and more
    weights are removed meanwhile.
    """
    score = Platon(beta1, beta2)
    return PruningWhileTraining(score, steps, lr, warmup, every, revive, schedule)


def taylor(
    *,
    steps: int | None = None,
    lr: float = LEARNING_RATE,
    warmup: tuple[float, float] | None = None,
    every: int = TAYLOR_EVERY,
    revive: bool = True,
    schedule: str = "cubic",
) -> PruningWhileTraining:
    """Taylor pruning (Molchanov et al., CVPR 2019): train, and remove by |gradient x weight|.

    The model is trained with the pre-training loss on the calibration batches, and more and more
    weights are removed meanwhile. The same score without training is the method `snip`.
    """
    return PruningWhileTraining(Taylor(), steps, lr, warmup, every, revive, schedule)
