"""A composition in rounds, for one target."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlp_plugins.calibration.batches import chain_hash
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.loss import copy_of_state, loss_state_again, write_state
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.context import Context
from vlp_plugins.methods.fresh_batches import FreshBatches
from vlp_plugins.methods.making import make_masks
from vlp_plugins.methods.round_files import Progress, RoundFile
from vlp_plugins.methods.survivors import LEAST, Survivors
from vlp_plugins.models.request import Target
from vlp_plugins.models.saving import restored
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, NonFiniteError
from vlp_plugins.runtime.sharding import zero_outside
from vlp_plugins.scoring.schedules import levels_of

if TYPE_CHECKING:
    from vlp_plugins.methods.iterative import Iterative

logger = logging.getLogger("vlp_plugins.methods")


@dataclass(frozen=True)
class RunInRounds:
    """What it takes to prune to one target.

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
        statistics = self._statistics(index) if method.reads_data else None
        composition = method.composition
        if before.masks is not None:
            composition = surviving(composition, before.masks, published=context.published)
        masks = make_masks(
            context.weights,
            composition,
            [level],
            statistics,
            floor=context.floor,
            owners=context.owners,
            published=context.published,
            seed=context.seed,
        )[0]
        remove(context.weights, masks)
        logger.info("%s: round %d of %d: %s", method.name, index + 1, method.rounds, masks)
        seen = before.seen
        if statistics is not None:
            seen = (*seen, (statistics.fingerprint, sum(statistics.samples)))
        state = copy_of_state(context.model, context.adapter) if context.workplace else []
        return Progress(masks, state, seen, index + 1)

    def _statistics(self, index: int) -> Statistics:
        context = self.context
        try:
            return calibrate(
                context.model,
                context.adapter,
                context.weights,
                self.batches.take(self.per_round),
                self.method.composition.needs,
                published=context.published,
                autocast=context.autocast,
                skip_nonfinite=context.skip_nonfinite,
                keep_state=True,
                limit=self.per_round,
                progress=self._told(index),
            )
        except NonFiniteError as error:
            raise NonFiniteError(
                f"round {index + 1} of {self.method.rounds}, whose batch 0 is batch "
                f"{index * self.per_round} of the data: {error}"
            ) from error

    def _resumed(self, file: RoundFile) -> Progress:
        """The model as the round left it that the file holds.

        Raises:
            DataError: if the batches of the rounds before are not those of the file.
        """
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
            remove(context.weights, progress.masks)
            write_state(context.model, context.adapter, progress.state)
            logger.info("%s goes on after round %d", self.method.name, progress.rounds)
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
            "variant": "published" if context.published else "default",
            "target": target,
            "floor": context.floor,
            "owners": context.owners,
            "seed": context.seed,
            "batches of a round": self.per_round,
            "autocast": str(context.autocast),
            "adapter": context.adapter.name,
            "structure": context.weights.structure,
            "weights": dense,
        }

    def _told(self, index: int) -> Callable[[int, int | None], None] | None:
        told = self.context.progress
        if told is None:
            return None
        before = (self.number * self.method.rounds + index) * self.per_round
        total = len(self.context.targets) * self.method.rounds * self.per_round
        return lambda done, _: told(before + done, total)


def surviving(composition: Composition, masks: Masks, *, published: bool) -> Composition:
    """The composition with what is dead at the lower end of its scores."""
    dead = 0.0 if published else LEAST
    allocated = composition.allocation_score
    return replace(
        composition,
        score=Survivors(composition.score, masks, dead),
        allocation_score=None if allocated is None else Survivors(allocated, masks, dead),
    )


def remove(weights: WeightMap, masks: Masks) -> None:
    """Sets what masks remove to zero, in place."""
    for name, weight in weights.items():
        zero_outside(weight.parameter, masks[name])
