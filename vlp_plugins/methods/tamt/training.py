"""The loop of mask training: mask the weights, take the gradient, move the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.sharding import whole, write, zero_outside
from vlp_plugins.scoring.selection import Selection


class Scores(Protocol):
    """What is trained."""

    def chosen(self) -> tuple[Mapping[str, Selection], Mapping[str, torch.Tensor]]:
        """What stays now, and the scores that say so."""

    def step(self, gradients: Mapping[str, torch.Tensor], factor: float) -> None:
        """One step.

        Args:
            gradients: of the loss by the weights as they were under the mask, by canonical name;
                may be overwritten.
            factor: of the learning rate.
        """


def train(
    scores: Scores,
    dense: Mapping[str, torch.Tensor],
    weights: WeightMap,
    probe: LossProbe,
    batches: Iterable[Batch],
    steps: int,
    told: Callable[[int], None],
) -> None:
    """Runs all steps, one batch each; the learning rate falls to zero on a straight line.

    Args:
        scores: changed in place.
        dense: values of the weights, by canonical name.
        weights: of the model; what they hold is overwritten.
        probe: attached to the model.
        batches: one for every step.
        steps: number of steps.
        told: called after every step with the number of steps done.
    """
    for step, batch in enumerate(batches):
        write_masked(weights, dense, scores)
        gradients = probe.measure(batch, step)
        if gradients is not None:  # else the batch was skipped, which costs a step
            scores.step({n: whole(g) for n, g in gradients.items()}, 1 - step / steps)
        told(step + 1)


def write_masked(weights: WeightMap, dense: Mapping[str, torch.Tensor], scores: Scores) -> None:
    """Gives every weight its dense values where it stays, and zero elsewhere; in place."""
    masks = masks_of(scores, weights)
    for name, weight in weights.items():
        write(weight.parameter, dense[name])
        zero_outside(weight.parameter, masks[name])


def masks_of(scores: Scores, weights: WeightMap) -> dict[str, torch.Tensor]:
    """By canonical name a bool mask of the weight's shape, true where the scores say stay."""
    chosen, values = scores.chosen()
    return {
        name: chosen[name].mask(values[name].flatten(1)).view(weight.shape)
        for name, weight in weights.items()
    }


@contextmanager
def dense_values(weights: WeightMap) -> Iterator[dict[str, torch.Tensor]]:
    """Copies of the weights on their device, which are written back at the end."""
    dense = {name: whole(weight.parameter).clone() for name, weight in weights.items()}
    try:
        yield dense
    finally:
        for name, weight in weights.items():
            write(weight.parameter, dense[name])
