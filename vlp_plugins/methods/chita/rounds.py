"""All rounds of CHITA++ for one target: gradients, pruning, new weights, checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlp_plugins.calibration.loss import copy_of_state, loss_state_again, write_state
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.batches import Seen
from vlp_plugins.methods.chita.checkpoints import Stage, StageFile
from vlp_plugins.methods.chita.finding import Found, find
from vlp_plugins.methods.chita.groups import groups_of
from vlp_plugins.methods.chita.model_values import write_values
from vlp_plugins.methods.chita.results import calibration_record, masks_of
from vlp_plugins.methods.chita.setup import Progress, Setup
from vlp_plugins.models.request import Target
from vlp_plugins.models.saving import restored
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.scoring.schedules import levels_of
from vlp_plugins.solvers.problem import Solution

if TYPE_CHECKING:
    from vlp_plugins.methods.chita.stages import ChitaInStages

logger = logging.getLogger("vlp_plugins.methods")


@dataclass(frozen=True)
class RunInStages:
    """What all targets of a run share.

    Attributes:
        method: CHITA++ as it was set.
        setup: of the run.
        rows: batches of a round.
    """

    method: ChitaInStages
    setup: Setup
    rows: int

    def prune(self, number: int, target: Target) -> Masks:
        """All rounds of one target, from the dense model on."""
        setup, context = self.setup, self.setup.context
        file = StageFile(context.workplace, self._identity(target))
        levels = levels_of(target, self.method.schedule, self.method.rounds)
        with (
            restored(context.weights),
            loss_state_again(context.model, context.adapter),
        ):
            stage = self._resumed(file) if context.resume else None
            for index in range(stage.done if stage else 0, self.method.rounds):
                stage = self._round(stage, index, levels[index], number, str(target))
                file.save(stage)
        assert stage is not None  # there is at least one round
        facts = {**stage.facts[-1], "stages": list(stage.facts)}
        found = Found(Solution(stage.values, stage.support, facts["objective"]), facts)
        more = {"rounds": self.method.rounds, "schedule": self.method.schedule}
        record = calibration_record(stage.digests, stage.sizes)
        return masks_of(setup, found, target, self.method.name, record, more)

    def _round(
        self, before: Stage | None, index: int, level: Target, number: int, target: str
    ) -> Stage:
        """Gradients, pruning and new weights of one round."""
        setup, context = self.setup, self.setup.context
        groups = groups_of(context.weights, level, setup.allocation, published=context.published)
        batches = self._batches(index)
        alive = None if before is None else setup.columns.split(before.support)
        progress = self._progress(number, index)
        with setup.pruner(batches, self.rows, alive, progress) as pruner:
            near = None if before is None else before.facts[-1]["lambda"]
            found = find(setup, pruner, groups, f"{target}, round {index + 1}", near)
        self._pass_over(batches)
        write_values(context.weights, setup.columns.split(found.solution.values))
        facts = {"sparsity": level, "kept": int(found.solution.support.sum()), **found.facts}
        return Stage(
            done=index + 1,
            support=found.solution.support,
            values=found.solution.values,
            state=copy_of_state(context.model, context.adapter),
            digests=(*(before.digests if before else ()), batches.digest.hex()),
            sizes=(*(before.sizes if before else ()), tuple(batches.sizes)),
            facts=(*(before.facts if before else ()), facts),
        )

    def _pass_over(self, batches: Seen) -> None:
        """Leaves the loss state as the losses of a round do, at the weights of its gradients.

        Gathering rows puts it back, because it may take several passes over the batches.
        """
        context = self.setup.context
        if not list(context.adapter.loss_state(context.model)):
            return
        with self.setup.probe.attached((), keep_state=True) as probe:
            for index, batch in enumerate(batches()):
                probe.advance(batch, index)

    def _resumed(self, file: StageFile) -> Stage | None:
        """The model as the stage left it that the file holds.

        Raises:
            DataError: if the batches of the rounds before are not those of the file.
        """
        setup, context = self.setup, self.setup.context
        stage = file.load(setup.device)
        if stage is None:
            return None
        for index, digest in enumerate(stage.digests):
            batches = self._batches(index)
            for _ in batches():
                pass
            if batches.digest.hex() != digest:
                raise DataError(
                    f"the batches of round {index + 1} are not those that checkpoint {file.path} "
                    "has seen; give the same data in the same order, or delete the checkpoint and "
                    "start again"
                )
        write_values(context.weights, setup.columns.split(stage.values))
        write_state(context.model, context.adapter, stage.state)
        logger.info("going on after round %d of %s", stage.done, file.path)
        return stage

    def _batches(self, index: int) -> Seen:
        return Seen(self.setup.calibration.from_(index * self.rows, self.rows))

    def _progress(self, number: int, index: int) -> Progress | None:
        told = self.setup.context.progress
        if told is None:
            return None
        before = (number * self.method.rounds + index) * self.rows
        total = len(self.setup.context.targets) * self.method.rounds * self.rows
        return lambda done, _: told(before + done, total)

    def _identity(self, target: Target) -> dict[str, Any]:
        context = self.setup.context
        return {
            "method": self.method.name,
            "parameters": {**self.method.parameters, **self.setup.settings.parameters()},
            **self.setup.allocation.record(),
            "variant": "published" if context.published else "default",
            "target": target,
            "batches of a round": self.rows,
            "autocast": str(context.autocast),
            "adapter": context.adapter.name,
            "structure": context.weights.structure,
            "weights": context.weights.content_hash(),
        }
