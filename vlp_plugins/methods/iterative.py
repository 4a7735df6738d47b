"""Any score, iterated: prune a little, measure the pruned model again, prune a little more."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vlp_plugins.calibration.loss import bytes_of_state
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context, Cost
from vlp_plugins.methods.rounds import (
    LEAST,
    FreshBatches,
    InRounds,
    Progress,
    RecordedBatches,
    RunInRounds,
    Survivors,
)
from vlp_plugins.models.request import Target
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, NonFiniteError, SparsityError
from vlp_plugins.runtime.sharding import zero_outside
from vlp_plugins.runtime.untrusted import read_as
from vlp_plugins.scoring.allocation import Allocation, Pattern
from vlp_plugins.scoring.factors import GUIDED, guided_name
from vlp_plugins.scoring.schedules import levels_of, schedule_by_name
from vlp_plugins.scoring.snip import Snip

logger = logging.getLogger("vlp_plugins.methods")


@dataclass(frozen=True)
class Pruned:
    """What the rounds so far found.

    Attributes:
        masks: what is kept.
        samples: that went into statistics.
    """

    masks: Masks
    samples: int


@dataclass(frozen=True)
class IterativeRun(RunInRounds[Pruned]):
    """A round gathers statistics of the model as it is and prunes by them.

    Attributes:
        method: what is iterated, and how.
        fresh: batches, shared by all targets; every one starts from the first.
    """

    method: Iterative
    fresh: FreshBatches

    def batches(self, index: int) -> RecordedBatches:
        if index == 0:
            self.fresh.restart()
        return RecordedBatches(lambda: self.fresh.take(self.per_round))

    def round(
        self, index: int, level: Target, batches: RecordedBatches, before: Pruned | None
    ) -> Pruned:
        context, method = self.context, self.method
        statistics = self._statistics(index, batches)
        composition = method.composition
        if before is not None:  # what was removed is at the lower end of the scores
            dead = 0.0 if context.published else LEAST
            allocated = composition.allocation_score
            if allocated is not None:
                allocated = Survivors(allocated, before.masks, dead)
            score = Survivors(composition.score, before.masks, dead)
            composition = replace(composition, score=score, allocation_score=allocated)
        masks = composition.masks(replace(context, targets=[level]), statistics)[0]
        logger.info("%s: round %d of %d: %s", method.name, index + 1, method.rounds, masks)
        samples = 0 if statistics is None else sum(statistics.samples)
        return Pruned(masks, samples + (0 if before is None else before.samples))

    def write(self, found: Pruned) -> None:
        remove_weights(self.context.weights, found.masks)

    def pack(self, found: Pruned) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        manifest = asdict(found.masks.manifest)
        return dict(found.masks.packed), {"manifest": manifest, "samples": found.samples}

    def unpack(self, tensors: dict[str, torch.Tensor], content: Mapping[str, Any]) -> Pruned:
        masks = Masks(tensors, Manifest.from_header(content["manifest"]))
        if masks.manifest.structure != self.context.weights.structure:
            raise ValueError("its masks are of another model")
        return Pruned(masks, read_as(int, content["samples"], "samples"))

    def result(self, found: Pruned, progress: Progress[Pruned]) -> Masks:
        manifest = found.masks.manifest
        calibration = manifest.calibration
        if calibration is not None:
            together = "".join(digest[:16] for digest in progress.digests).encode()
            calibration = {
                **calibration,
                "fingerprint": hashlib.sha256(together).hexdigest()[:16],
                "batches": self.per_round * progress.rounds,
                "samples": found.samples,
            }
        target = self.target
        manifest = replace(
            manifest,
            method=self.method.name,
            parameters={
                **self.method.parameters,
                "batches_per_round": self.per_round,
                **manifest.parameters,
            },
            sparsity=dict(target) if isinstance(target, Mapping) else target,
            calibration=calibration,
            weights_hash=self.dense,
        )
        return Masks(found.masks.packed, manifest)

    def identity(self) -> dict[str, Any]:
        context = self.context
        more = {"floor": context.floor, "owners": context.owners, "seed": context.seed}
        return {**super().identity(), **more}

    def _statistics(self, index: int, batches: RecordedBatches) -> Statistics | None:
        context = replace(
            self.context,
            batches=batches(),
            limit=self.per_round,
            resume=False,
            progress=self.progress(index),
        )
        try:
            return self.method.composition.gather(context, keep_state=True)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"round {index + 1} of {self.method.rounds}, whose batch 0 is batch "
                f"{index * self.per_round} of the data: {error}"
            ) from error


def remove_weights(weights: WeightMap, masks: Masks) -> None:
    """Sets what masks remove to zero, in place."""
    for name, weight in weights.items():
        with weight.changing() as parameter:
            zero_outside(parameter, masks[name])


DEFAULT_ROUNDS = 8


def itersnip(
    *, rounds: int = DEFAULT_ROUNDS, schedule: str = "exp", batches_per_round: int | None = None
) -> Iterative:
    """IterSNIP (de Jorge et al., ICLR 2021): SNIP in rounds, with gradients of the pruned model.

    The MULTIFLOW paper takes 60 rounds of 50 batches and the exponential schedule.

    Args:
        rounds: number of rounds.
        schedule: `exp`, `linear`, `const` or `cubic`.
        batches_per_round: fresh batches of every round; None: all batches, divided evenly.
    """
    snip = Composition("snip", Snip())
    return Iterative(snip, rounds=rounds, schedule=schedule, batches_per_round=batches_per_round)


@dataclass(frozen=True)
class Iterative(InRounds):
    """A composition in rounds.

    Every round gathers the statistics of the composition on the pruned model, from batches that
    no round before has seen, and prunes to the sparsity of its schedule. What was removed stays
    removed. Every target starts from the dense model and the first batch; what the losses change
    (BLIP's queues and momentum copies) is kept from round to round.

    Example:
        prune(model, batches, method=Iterative(Composition("wanda", Wanda()), rounds=5), ...)

    Attributes:
        composition: what is done in every round.
        rounds: number of rounds.
        schedule: name of what leads from 0 to the target; see `vlp_plugins.scoring.schedules`.
        batches_per_round: number of fresh batches; None divides all batches among the rounds.
    """

    composition: Composition
    rounds: int = DEFAULT_ROUNDS
    schedule: str = "exp"
    batches_per_round: int | None = None

    def __post_init__(self) -> None:
        schedule_by_name(self.schedule)
        if self.rounds < 1:
            raise SparsityError(f"rounds={self.rounds}; use 1 or more")
        if self.batches_per_round is not None and self.batches_per_round < 1:
            raise DataError(f"batches_per_round={self.batches_per_round}; use 1 or more, or None")

    @property
    def name(self) -> str:  # type: ignore[override]
        """`iter` and the name of the composition; with factors `id*` stays in front."""
        if self.composition.factors is None:
            return f"iter{self.composition.name}"
        return guided_name(f"iter{self.composition.name.removeprefix(GUIDED)}")

    @property
    def allocation(self) -> Allocation:  # type: ignore[override]
        """That of the composition."""
        return self.composition.allocation

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        return {
            **self.composition.parameters,
            "rounds": self.rounds,
            "schedule": self.schedule,
            "batches_per_round": self.batches_per_round,
        }

    @property
    def reads_data(self) -> bool:
        return self.composition.reads_data

    @property
    def takes_gradients(self) -> bool:
        return self.composition.takes_gradients

    @property
    def relative_cost(self) -> str:
        return f"{self.composition.relative_cost} per sparsity"

    def with_allocation(self, allocation: Allocation | None) -> Iterative:
        return replace(self, composition=self.composition.with_allocation(allocation))

    def with_factors(self, factors: Mapping[str, float]) -> Iterative:
        return replace(self, composition=self.composition.with_factors(factors))

    def _check_pattern(self, context: Context) -> None:
        for target in context.targets:
            levels = levels_of(target, self.schedule, self.rounds)
            if isinstance(self.allocation, Pattern) and any(level != target for level in levels):
                raise SparsityError(
                    f"pattern {self.allocation.name} fixes the sparsity, so it cannot rise over "
                    f"{self.rounds} rounds; use rounds=1 or schedule='const', or another allocation"
                )

    def run(self, context: Context) -> list[Masks]:
        self._check_pattern(context)
        per_round = self._batches_of_a_round(context)
        fresh = FreshBatches(context.batches, context.limit)
        dense = context.weights.content_hash()
        return [
            IterativeRun(self, context, number, per_round, dense, fresh).masks()
            for number in range(len(context.targets))
        ]

    def cost(self, context: Context) -> Cost:
        self._check_pattern(context)
        per_round = self._batches_of_a_round(context)
        of_a_target = self.rounds * per_round
        runs = len(context.targets)
        batches = runs * of_a_target
        total = context.number_of_batches() or of_a_target
        copies = context.weights.stored_bytes
        state = bytes_of_state(context.model, context.adapter)
        by_loss = self.takes_gradients
        sums = self.composition.statistics_bytes(context.weights)
        gradients = 4 * context.weights.numel if by_loss else 0
        return Cost(
            ram_bytes=copies + state + gradients + 2 * sums,
            disk_bytes=0 if context.workplace is None else runs * state,
            passes=runs * -(-of_a_target // total) if of_a_target else 0,
            gradient_batches=batches if by_loss else 0,
            forward_batches=0 if by_loss else batches,
            choices=runs * self.rounds,
            notes=(
                f"{self.rounds} rounds of {per_round} batches for each of {runs} sparsities: every "
                "sparsity starts from the dense model",
            ),
        )

    def _batches_of_a_round(self, context: Context) -> int:
        if not self.reads_data:
            return 0
        if self.batches_per_round is not None:
            return self.batches_per_round
        total = context.known_number_of_batches(
            "batches_per_round", "they are divided among the rounds"
        )
        return max(1, total // self.rounds)
