"""Task-agnostic mask training (TAMT): masks trained by gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from vlp_plugins.calibration.loss import bytes_of_state
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.method import Context, Cost
from vlp_plugins.methods.rounds import FreshBatches, RecordedBatches, Stepwise
from vlp_plugins.methods.tamt.scores import (
    LEARNING_RATE,
    MAGNITUDE,
    STARTS,
    MaskRule,
    PublishedScores,
    Scores,
    SignedScores,
)
from vlp_plugins.methods.tamt.scores import PUBLISHED_LEARNING_RATE as PUBLISHED_RATE
from vlp_plugins.models.request import Target
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.distributed import broadcast
from vlp_plugins.runtime.errors import UnsupportedError, suggest
from vlp_plugins.runtime.sharding import whole, write, zero_outside
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation, ModalityAllocation
from vlp_plugins.scoring.factors import Factors, guided_name


def write_masked(weights: WeightMap, dense: Mapping[str, torch.Tensor], scores: Scores) -> None:
    """Gives every weight its dense values where it stays, and zero elsewhere; in place."""
    masks = scores.masks()
    for name, weight in weights.items():
        with weight.changing() as parameter:
            write(parameter, dense[name])
            zero_outside(parameter, masks[name])


@contextmanager
def dense_values(weights: WeightMap) -> Iterator[dict[str, torch.Tensor]]:
    """Copies of the weights on their device, which are written back at the end."""
    dense = {name: weight.values.clone() for name, weight in weights.items()}
    try:
        yield dense
    finally:
        for name, weight in weights.items():
            with weight.changing() as parameter:
                write(parameter, dense[name])


@dataclass(frozen=True)
class Tamt(Stepwise):
    """Task-agnostic mask training, with a fixed budget of steps.

    Liu et al., "Learning to Win Lottery Tickets in BERT Transfer via Task-agnostic Mask Training"
    (NAACL 2022), as the supplement of the MULTIFLOW paper adapts it. Scores, one per weight, are
    trained by the pre-training loss of the model under the mask of the largest; straight-through
    gradients treat the mask as if it were the score. The weights stay as they are.

    The default departs from the published code, which `variant="published"` reproduces with its
    defects: the mask has the target sparsity from the first step on; signed scores let removed
    weights come back; the step is made for few steps (see `SignedScores`); and the model runs in
    evaluation mode, as dropout adds noise that few steps cannot average out. What both can do:
    `python -m benchmarks.demo.tamt`.

    BLIP's momentum copies follow the weights under the mask; the published code's follow the dense
    ones, which changes no more than a few bits (18 of 45,568 at most in the recorded runs).

    Attributes:
        steps: number of steps, one batch each; None: one per batch of the data.
        lr: learning rate of the first step; None: that of the variant.
        allocation: how many elements each tensor keeps.
        factors: what multiplies the scores that tensors are compared by; None: nothing.
        start: what the first mask is made by, a key of `STARTS`. Only from magnitudes there is a
            published variant.
        called: name of the method, without factors.
    """

    steps: int | None = None
    lr: float | None = None
    allocation: Allocation = field(default_factory=GlobalAllocation)
    factors: Factors | None = None
    start: str = MAGNITUDE
    called: str = "tamt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in STARTS:
            raise UnsupportedError(
                f"mask training cannot start from {self.start!r}{suggest(self.start, list(STARTS))}"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        """As it is called; with factors `id*` in front."""
        return self.called if self.factors is None else guided_name(self.called)

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        return {"steps": self.steps, "lr": self.lr, **self._record()}

    def _record(self) -> dict[str, Any]:
        start = {} if self.start == MAGNITUDE else {"start": self.start}
        return start if self.factors is None else {**start, **self.factors.record()}

    def run(self, context: Context) -> list[Masks]:
        self._check_variant(context)
        return super().run(context)

    def _check_variant(self, context: Context) -> None:
        if context.published and self.start != MAGNITUDE:
            raise UnsupportedError(
                f"the published mask training starts from magnitudes, {self.called!r} from "
                f"{self.start!r}; leave out variant='published'"
            )
        if context.published and not isinstance(self.allocation, GlobalAllocation):
            raise UnsupportedError(
                f"the published mask training has one threshold for all tensors and no "
                f"{self.allocation.name} allocation; leave out the allocation (and budgets per "
                "modality), or variant='published'"
            )
        if self.factors is not None:
            self.factors.check(context.weights)

    def cost(self, context: Context) -> Cost:
        self._check_variant(context)
        size = context.weights.numel
        copies = context.weights.stored_bytes
        state = bytes_of_state(context.model, context.adapter)
        tensors = 5 if context.published else 2  # scores (with moments and |M|) and gradients
        return self._cost(context, ram_bytes=copies + state + tensors * 4 * size)

    def train(
        self, context: Context, target: Target, batches: FreshBatches, number: int = 0
    ) -> tuple[Scores, RecordedBatches]:
        """Trains for one target, from the dense model and the first batch on, a batch each step.

        The learning rate falls linearly to zero.

        Args:
            context: of the run; the model is as before at the end, and after an error too.
            target: sparsity.
            batches: shared by all targets.
            number: index of the target, for progress.

        Returns:
            The scores after the last step, and the batches that were read.
        """
        steps = self._steps(context)
        batches.restart()
        seen = RecordedBatches(lambda: batches.take(steps))
        probe = context.loss_probe()
        with (
            torch.inference_mode(False),
            dense_values(context.weights) as dense,
            probe.attached(),
        ):
            if context.published:
                _train_mode(context.model)
            scores = self._scores(context, dense, target)
            for step, batch in enumerate(seen()):
                write_masked(context.weights, dense, scores)
                gradients = probe.measure(batch, step)
                if gradients is not None:  # else the batch was skipped, which costs a step
                    scores.step({n: whole(g) for n, g in gradients.items()}, 1 - step / steps)
                self._report(context, number, step + 1)
        return scores, seen

    def _masks(self, context: Context, target: Target, batches: FreshBatches, number: int) -> Masks:
        scores, seen = self.train(context, target, batches, number)
        manifest = Manifest.for_weights(
            context.weights,
            method=self.name,
            parameters={
                "steps": len(seen.sizes),
                "lr": self._rate(context),
                **self.allocation.record(),
                "floor": context.floor,
                "variant": context.variant,
                **self._record(),
            },
            seed=context.seed,
            sparsity=target,
            calibration=seen.calibration(),
        )
        # Every process runs every step; where their arithmetic differs, that of the first counts.
        return broadcast(Masks.from_dense(scores.masks(), manifest))

    def _rate(self, context: Context) -> float:
        return self.lr or (PUBLISHED_RATE if context.published else LEARNING_RATE)

    def _scores(self, context: Context, dense: dict[str, torch.Tensor], target: Target) -> Scores:
        rule = MaskRule(context.weights, self.allocation, target, context.floor, context.published)
        rate = self._rate(context)
        if context.published and not isinstance(target, Mapping):
            return PublishedScores(dense, rule, float(target), rate, self.factors)
        return SignedScores(dense, rule, rate, self.factors, self.start)


def _train_mode(model: nn.Module) -> None:
    """Dropout on; batch norms keep their running averages, which would not be restored."""
    for module in model.modules():
        module.training = not isinstance(module, _NormBase)


def tamt(*, steps: int | None = None, lr: float | None = None) -> Tamt:
    """TAMT (Liu et al., NAACL 2022): train the masks by the pre-training loss, not the weights."""
    return Tamt(steps, lr)


def lamp_tamt(*, steps: int | None = None, lr: float | None = None) -> Tamt:
    """TAMT from LAMP's masks of each modality on; of this project, not published.

    TAMT's signed scores, but tensors are compared by LAMP (Lee et al., ICLR 2021) at the first
    step, and every modality is pruned to the target as in MULTIFLOW. How it was found, and what
    each of its parts brings: `python -m benchmarks.papers search better --render`.
    """
    return Tamt(steps, lr, ModalityAllocation(), start="lamp", called="lamp-tamt")
