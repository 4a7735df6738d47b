"""Masks whose sparsity rises while weights train, and the schedule that they follow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.gradual.scores import State, TrainingScore
from vlp_plugins.methods.rounds import Survivors
from vlp_plugins.models.request import Target, whole_number
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import SparsityError
from vlp_plugins.runtime.model_state import neutral_state
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation, Pattern
from vlp_plugins.scoring.factors import Factors, Scaled, guided_name
from vlp_plugins.scoring.schedules import at_step, level_of, schedule_by_name
from vlp_plugins.scoring.score import Evidence, Scorer
from vlp_plugins.scoring.selection import Scored


@dataclass(frozen=True)
class Timetable:
    """Steps of an optimizer, counted from 1.

    For the first `before` steps nothing is removed, while scores are gathered. Then masks are
    chosen after every step that `every` divides, the last time after step `steps - after`, when
    they have the target sparsity exactly; for the rest of the steps they stay as they are.

    Attributes:
        steps: number of steps.
        before: initial warm-up.
        after: final warm-up, while the weights that are left recover.
        every: steps from one choice to the next.
        schedule: name of the schedule of the rise; see `vlp_plugins.scoring.schedules`.
    """

    steps: int
    before: int = 0
    after: int = 0
    every: int = 10
    schedule: str = "cubic"

    def __post_init__(self) -> None:
        for name in ("steps", "before", "after", "every"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.every < 1:
            raise SparsityError(f"every={self.every}; masks are chosen every 1 or more steps")
        self.level(0.0, 0)  # says what is wrong with the others

    @property
    def last(self) -> int:
        """The step after which masks are chosen for the last time."""
        return self.steps - self.after

    def window_ends(self, step: int) -> bool:
        """Whether the samples since the last window are folded into the scores after a step."""
        return step <= self.last and (step % self.every == 0 or step == self.last)

    def chooses(self, step: int) -> bool:
        """Whether masks are chosen after a step."""
        return step > self.before and self.window_ends(step)

    def level(self, target: Target, step: int) -> Target:
        """The sparsity that masks have after a step, by modality if the target is."""
        rise = schedule_by_name(self.schedule)

        def reached(value: float) -> float:
            return at_step(
                step, self.steps, value, before=self.before, after=self.after, schedule=rise
            )

        return level_of(target, reached)

    def record(self) -> dict[str, Any]:
        """For the manifest of masks."""
        return {
            "steps": self.steps,
            "warmup": [self.before, self.after],
            "every": self.every,
            "schedule": self.schedule,
        }


def default_warmup(steps: int) -> tuple[int, int]:
    """A twentieth of the steps before and a quarter after, as in PLATON's longest runs.

    5,400 and 27,000 of 98,000 steps on MNLI.
    """
    return steps // 20, steps // 4


logger = logging.getLogger("vlp_plugins.methods")


@dataclass(frozen=True)
class Rise:
    """How masks are chosen.

    Attributes:
        score: ranks what is removed.
        target: sparsity at the end.
        timetable: when masks are chosen.
        allocation: how many elements each tensor keeps.
        floor: least fraction that every tensor keeps.
        revive: whether removed weights train on between two choices, and may come back.
        factors: what multiplies the scores that tensors are compared by; None: nothing.
    """

    score: TrainingScore
    target: Target
    timetable: Timetable
    allocation: Allocation = field(default_factory=GlobalAllocation)
    floor: float = 0.0
    revive: bool = True
    factors: Factors | None = None

    def __post_init__(self) -> None:
        if isinstance(self.allocation, Pattern) and self.timetable.schedule not in _AT_ONCE:
            raise SparsityError(
                f"pattern {self.allocation.name} fixes the sparsity, so it cannot rise; use "
                "schedule='constant', or another allocation"
            )

    @property
    def name(self) -> str:
        """Of the score; `id*` before it with factors."""
        return self.score.name if self.factors is None else guided_name(self.score.name)

    def record(self) -> dict[str, Any]:
        """For the manifest of masks."""
        return {
            **self.score.parameters,
            **self.timetable.record(),
            **self.allocation.record(),
            "floor": self.floor,
            "revive": self.revive,
            **({} if self.factors is None else self.factors.record()),
        }


_AT_ONCE = ("const", "constant")


class RisingMasks:
    """The masks of weights in training.

    Call `observe` before every step and `advance` after it. With `revive`, as published, removed
    weights are zeroed when masks are chosen and train on until the next choice: one that grows an
    importance again comes back. From the last choice on they stay zero; without `revive` from the
    first on.

    Attributes:
        rise: how they are chosen.
        weights: what they are of.
        step: number of steps so far.
        keep: by canonical name a bool mask on the weight's device, True = kept; empty before the
            first choice.
        state: what the score remembers, by canonical name.
        sums: by canonical name, of the samples of this window, float32 `[numel]`.
        samples: how many these are.
    """

    def __init__(self, weights: WeightMap, rise: Rise) -> None:
        """Starts with everything kept.

        Raises:
            StatisticsError: if a weight has no factor.
        """
        if rise.factors is not None:
            rise.factors.check(weights)
        self.rise = rise
        self.weights = weights
        self.step = 0
        self.keep: dict[str, torch.Tensor] = {}
        self.state: dict[str, State] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self.samples = 0

    @property
    def finished(self) -> bool:
        """Whether the masks are the last ones."""
        return self.step >= self.rise.timetable.last

    @property
    def held(self) -> bool:
        """Whether what is removed now shall stay zero at every step."""
        return bool(self.keep) and (self.finished or not self.rise.revive)

    @property
    def sparsity(self) -> float:
        """Fraction that the masks remove now."""
        kept = sum(int(mask.sum()) for mask in self.keep.values())
        return 1 - kept / self.weights.numel if self.keep else 0.0

    @neutral_state()
    @torch.no_grad()
    def observe(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Records the samples of this step.

        Args:
            gradients: by canonical name, float32, of the weight's shape; a weight without one has
                samples of 0.
        """
        score = self.rise.score
        if not score.reads_gradients or self.finished:
            return
        self.samples += 1
        for name, gradient in gradients.items():
            sample = score.sample(self.weights[name].parameter.detach(), gradient).flatten()
            known = self.sums.get(name)
            self.sums[name] = sample if known is None else known.add_(sample)

    @neutral_state()
    def advance(self) -> bool:
        """Counts a step as done.

        Returns:
            Whether masks were chosen: what they remove is to be zeroed now.

        Raises:
            NonFiniteError: if scores are not finite.
            SparsityError: if the target cannot be met.
        """
        self.step += 1
        times = self.rise.timetable
        if times.window_ends(self.step):
            self._fold()
        chosen = times.chooses(self.step)
        if chosen:
            self._choose(times.level(self.rise.target, self.step))
        if self.finished:
            self.state, self.sums, self.samples = {}, {}, 0  # several times the model's size
        return chosen

    def masks(
        self,
        *,
        weights_hash: str | None = None,
        values: Mapping[str, torch.Tensor] | None = None,
        **facts: Any,
    ) -> Masks:
        """The masks as they are now.

        Args:
            weights_hash: of the model before.
            values: new values of the weights, by canonical name.
            facts: other fields of the manifest (`parameters`, `seed`, `calibration`).
        """
        manifest = Manifest.for_weights(
            self.weights,
            method=self.rise.name,
            sparsity=self.rise.target,
            weights_hash=weights_hash,
            **{"parameters": self.rise.record(), **facts},
        )
        keep = self.keep or {
            name: torch.ones(weight.shape, dtype=torch.bool, device="cpu")
            for name, weight in self.weights.items()
        }
        return Masks.from_dense(keep, manifest, values)

    @torch.no_grad()
    def _fold(self) -> None:
        if not self.samples:
            return
        for name, weight in self.weights.items():
            total = self.sums.pop(name, None)
            if total is None:
                total = torch.zeros(weight.numel, device=weight.parameter.device)
            self.rise.score.fold(self.state.setdefault(name, {}), total.div_(self.samples))
        self.samples = 0

    @torch.no_grad()
    def _choose(self, level: Target) -> None:
        scorer: Scorer = self.rise.score
        if self.rise.factors is not None:
            scorer = Scaled(scorer, self.rise.factors)
        if self.keep and not self.rise.revive:
            scorer = Survivors(scorer, self.keep)
        evidence = {name: Evidence(name, 0, self._remembered(name)) for name in self.weights}
        scored = Scored(scorer, self.weights, evidence)
        found = self.rise.allocation.select(scored, [level], floor=self.rise.floor)[0]
        ranked = scored.ranking()
        self.keep = {
            name: found[name].mask(ranked.scores(name)).view(weight.shape)
            for name, weight in self.weights.items()
        }
        logger.info("step %d: %.4f of the weights removed", self.step, self.sparsity)

    def _remembered(self, name: str) -> State:
        """The state of a weight; zeros if all steps so far were skipped."""
        known = self.state.get(name)
        if known is not None:
            return known
        weight = self.weights[name]
        nothing = torch.zeros(weight.numel, device=weight.parameter.device)
        return dict.fromkeys(self.rise.score.remembers, nothing)
