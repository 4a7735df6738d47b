"""Any score, iterated: prune a little, measure the pruned model again, prune a little more."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from vlp_plugins.calibration.batches import chain_hash
from vlp_plugins.calibration.loss import (
    bytes_of_state,
    copy_of_state,
    loss_state_again,
    write_state,
)
from vlp_plugins.calibration.statistic import LossStatistic
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context, Cost, Procedure
from vlp_plugins.methods.rounds import (
    LEAST,
    FreshBatches,
    Progress,
    RoundFile,
    Survivors,
)
from vlp_plugins.models.request import Target
from vlp_plugins.models.saving import restored
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, NonFiniteError, SparsityError
from vlp_plugins.runtime.sharding import zero_outside
from vlp_plugins.scoring.allocation import Allocation, Pattern
from vlp_plugins.scoring.factors import GUIDED, guided_name
from vlp_plugins.scoring.schedules import levels_of, schedule_by_name
from vlp_plugins.scoring.snip import Snip

logger = logging.getLogger("vlp_plugins.methods")


@dataclass(frozen=True)
class RunInRounds:
    """The rounds of one target.

    Attributes:
        method: what is iterated, and how.
        context: of the run.
        batches: shared by all targets; every one starts from the first.
        per_round: how many of them a round reads; 0 for a method without data.
        number: index of the target, for progress.
    """

    method: Iterative
    context: Context
    batches: FreshBatches
    per_round: int
    number: int

    def prune(self, target: Target) -> Masks:
        """All rounds from the dense model on; it is as before at the end, after an error too."""
        context, method = self.context, self.method
        dense = context.weights.content_hash()
        file = RoundFile(context.workplace, self._identity(target, dense))
        levels = levels_of(target, method.schedule, method.rounds)
        self.batches.restart()
        with ExitStack() as stack:
            stack.enter_context(restored(context.weights))
            stack.enter_context(loss_state_again(context.model, context.adapter))
            progress = self._resumed(file) if context.resume else Progress()
            for index in range(progress.rounds, method.rounds):
                progress = self._round(index, levels[index], progress)
                file.save(progress)
        return self._result(target, dense, progress)

    def _round(self, index: int, level: Target, before: Progress) -> Progress:
        """Statistics of the model as it is, masks, and the model under the masks."""
        context, method = self.context, self.method
        statistics = self._statistics(index)
        composition = method.composition
        if before.masks is not None:
            composition = surviving(composition, before.masks, published=context.published)
        masks = composition.masks(replace(context, targets=[level]), statistics)[0]
        remove_weights(context.weights, masks)
        logger.info("%s: round %d of %d: %s", method.name, index + 1, method.rounds, masks)
        seen = before.seen
        if statistics is not None:
            seen = (*seen, (statistics.fingerprint, sum(statistics.samples)))
        state = copy_of_state(context.model, context.adapter) if context.workplace else []
        return Progress(masks, state, seen, index + 1)

    def _statistics(self, index: int) -> Statistics | None:
        context = replace(
            self.context,
            batches=self.batches.take(self.per_round),
            limit=self.per_round,
            resume=False,
            progress=self._progress(index),
        )
        try:
            return self.method.composition.gather(context, keep_state=True)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"round {index + 1} of {self.method.rounds}, whose batch 0 is batch "
                f"{index * self.per_round} of the data: {error}"
            ) from error

    def _resumed(self, file: RoundFile) -> Progress:
        """The state after the last round on disk, which the model is brought to."""
        context = self.context
        progress = file.load()
        for index, (fingerprint, _) in enumerate(progress.seen):
            digest = b""
            for batch in self.batches.take(self.per_round):
                digest = chain_hash(digest, batch)
            if digest.hex()[: len(fingerprint)] != fingerprint:
                raise DataError(
                    f"the batches of round {index + 1} are not those that checkpoint {file.path} "
                    "has seen; give the same data in the same order, or delete the checkpoint and "
                    "start again"
                )
        if progress.masks is not None:
            remove_weights(context.weights, progress.masks)
            write_state(context.model, context.adapter, progress.state)
            logger.info("%s resumes after round %d", self.method.name, progress.rounds)
        return progress

    def _result(self, target: Target, dense: str, progress: Progress) -> Masks:
        """The masks of the last round, with what the whole run was."""
        if progress.masks is None:
            raise AssertionError("a method has at least one round")
        manifest = progress.masks.manifest
        calibration = manifest.calibration
        if calibration is not None:
            together = "".join(fingerprint for fingerprint, _ in progress.seen).encode()
            calibration = {
                **calibration,
                "fingerprint": hashlib.sha256(together).hexdigest()[:16],
                "batches": self.per_round * len(progress.seen),
                "samples": sum(samples for _, samples in progress.seen),
            }
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
            weights_hash=dense,
        )
        return Masks(progress.masks.packed, manifest)

    def _identity(self, target: Target, dense: str) -> dict[str, Any]:
        context, method = self.context, self.method
        return {
            "method": method.name,
            "parameters": method.parameters,
            **method.allocation.record(),
            "target": target,
            "floor": context.floor,
            "owners": context.owners,
            "batches of a round": self.per_round,
            **context.identity(dense),
        }

    def _progress(self, index: int) -> Callable[[int, int | None], None] | None:
        progress = self.context.progress
        if progress is None:
            return None
        before = (self.number * self.method.rounds + index) * self.per_round
        total = len(self.context.targets) * self.method.rounds * self.per_round
        return lambda done, _: progress(before + done, total)


def surviving(composition: Composition, masks: Masks, *, published: bool) -> Composition:
    """The composition with removed elements at the lower end of its scores."""
    dead = 0.0 if published else LEAST
    allocated = composition.allocation_score
    return replace(
        composition,
        score=Survivors(composition.score, masks, dead),
        allocation_score=None if allocated is None else Survivors(allocated, masks, dead),
    )


def remove_weights(weights: WeightMap, masks: Masks) -> None:
    """Sets what masks remove to zero, in place."""
    for name, weight in weights.items():
        zero_outside(weight.parameter, masks[name])


DEFAULT_ROUNDS = 8


def itersnip(
    *, rounds: int = DEFAULT_ROUNDS, schedule: str = "exp", batches_per_round: int | None = None
) -> Iterative:
    """IterSNIP (de Jorge et al., "Progressive Skeletonization", ICLR 2021): SNIP in rounds.

    The MULTIFLOW paper takes 60 rounds of 50 batches and the exponential schedule.

    Args:
        rounds: number of rounds.
        schedule: `exp`, `linear`, `const` or `cubic`.
        batches_per_round: fresh batches of every round; None: all batches, divided evenly.
    """
    snip = Composition("snip", Snip())
    return Iterative(snip, rounds=rounds, schedule=schedule, batches_per_round=batches_per_round)


@dataclass(frozen=True)
class Iterative(Procedure):
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

    def with_allocation(self, allocation: Allocation | None) -> Iterative:
        return replace(self, composition=self.composition.with_allocation(allocation))

    def with_factors(self, factors: Mapping[str, float]) -> Iterative:
        return replace(self, composition=self.composition.with_factors(factors))

    def run(self, context: Context) -> list[Masks]:
        for target in context.targets:
            levels = levels_of(target, self.schedule, self.rounds)
            if isinstance(self.allocation, Pattern) and any(level != target for level in levels):
                raise SparsityError(
                    f"pattern {self.allocation.name} fixes the sparsity, so it cannot rise over "
                    f"{self.rounds} rounds; use rounds=1 or schedule='const', or another allocation"
                )
        per_round = self._batches_of_a_round(context)
        batches = FreshBatches(context.batches, context.limit)
        return [
            RunInRounds(self, context, batches, per_round, number).prune(target)
            for number, target in enumerate(context.targets)
        ]

    def cost(self, context: Context) -> Cost:
        per_round = self._batches_of_a_round(context)
        of_a_target = self.rounds * per_round
        runs = len(context.targets)
        total = context.number_of_batches() or of_a_target
        copies = context.weights.stored_bytes
        state = bytes_of_state(context.model, context.adapter)
        by_loss = any(isinstance(statistic, LossStatistic) for statistic in self.composition.needs)
        sums = self.composition.statistics_bytes(context.weights)
        gradients = 4 * context.weights.numel if by_loss else 0
        return Cost(
            ram_bytes=copies + state + gradients + 2 * sums,
            disk_bytes=0 if context.workplace is None else runs * state,
            passes=runs * -(-of_a_target // total) if of_a_target else 0,
            gradient_batches=runs * of_a_target if by_loss else 0,
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
