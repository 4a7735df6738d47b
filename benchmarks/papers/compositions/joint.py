"""Mask training that trains the weights too: the same gradients serve both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.rounds import FreshBatches
from vlp_plugins.methods.tamt.method import Tamt, write_masked
from vlp_plugins.methods.tamt.scores import LEARNING_RATE, SignedScores
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.request import Target
from vlp_plugins.runtime.sharding import whole

BETAS = (0.9, 0.99)
EPSILON = 1e-8


@dataclass(frozen=True)
class JointTraining(Tamt):
    """TAMT's signed scores and the weights that they keep, trained by one backward per step.

    Attributes:
        weight_lr: learning rate of AdamW's kind of step for kept weights.
        settled: fraction of the steps at the end in which the mask stays and weights train on.
    """

    weight_lr: float = 1e-3
    settled: float = 0.25
    name: ClassVar[str] = "joint"  # type: ignore[misc]

    def _masks(self, context: Context, target: Target, batches: FreshBatches, number: int) -> Masks:
        steps = self._steps(context)
        batches.restart()
        probe = context.loss_probe()
        weights = context.weights
        dense = {name: whole(weight.parameter).clone() for name, weight in weights.items()}
        trained = {name: value.clone() for name, value in dense.items()}
        scores = self._scores(context, trained, target)
        assert isinstance(scores, SignedScores)
        try:
            with torch.inference_mode(False), probe.attached():
                loop = _Loop(self, scores, trained, context, steps)
                kept = loop.run(probe, batches.take(steps))
        finally:
            for name, weight in weights.items():
                weight.parameter.data.copy_(dense[name])
        manifest = Manifest.for_weights(
            weights, method="joint", parameters={"steps": steps, "lr": self.lr or LEARNING_RATE},
            seed=context.seed, sparsity=target,
        )  # fmt: skip
        values = {name: value * kept[name] for name, value in trained.items()}
        return Masks.from_dense(kept, manifest, values)


class _Loop:
    def __init__(
        self,
        method: JointTraining,
        scores: SignedScores,
        trained: dict[str, torch.Tensor],
        context: Context,
        steps: int,
    ) -> None:
        self.method, self.scores, self.trained = method, scores, trained
        self.context, self.steps = context, steps
        self.mean = {name: torch.zeros_like(value) for name, value in trained.items()}
        self.square = {name: torch.zeros_like(value) for name, value in trained.items()}

    def run(self, probe: LossProbe, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
        weights = self.context.weights
        last = int(self.steps * (1 - self.method.settled))
        for step, batch in enumerate(batches):
            write_masked(weights, self.trained, self.scores)
            gradients = probe.measure(batch, step)
            if gradients is None:
                continue
            kept = self.scores.masks()
            factor = 1 - step / self.steps
            self._train({n: g.clone() for n, g in gradients.items()}, kept, step, factor)
            if step < last:
                self.scores.step(dict(gradients), 1 - step / last)
        return self.scores.masks()

    def _train(
        self,
        gradients: dict[str, torch.Tensor],
        kept: dict[str, torch.Tensor],
        step: int,
        factor: float,
    ) -> None:
        one, two = BETAS
        for name, gradient in gradients.items():
            mean = self.mean[name].mul_(one).add_(gradient, alpha=1 - one)
            square = self.square[name].mul_(two).addcmul_(gradient, gradient, value=1 - two)
            size = (square / (1 - two ** (step + 1))).sqrt_().add_(EPSILON)
            move = mean / (1 - one ** (step + 1)) / size
            self.trained[name].sub_(move * kept[name], alpha=self.method.weight_lr * factor)
