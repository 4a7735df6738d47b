"""CHITA in one shot and CHITA++ in rounds, as users name them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from vlp_plugins.calibration.loss import copy_of_state, loss_state_again, write_state
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.cost import cost_of
from vlp_plugins.methods.chita.pruner import (
    check_allocation,
    check_floor,
    groups_of_weights,
    write_values,
)
from vlp_plugins.methods.chita.settings import (
    DEFAULT_EFFORT,
    DEFAULT_HELD_OUT,
    DEFAULT_LAMBDA,
    DEFAULT_ROUNDS,
    DEFAULT_SCHEDULE,
    BlockSize,
    FirstOrder,
    Lambda,
    Settings,
)
from vlp_plugins.methods.chita.setup import Calibration, Progress, Seen, Setup
from vlp_plugins.methods.chita.solver.problem import Solution
from vlp_plugins.methods.chita.solver.solve import Effort, check_importance
from vlp_plugins.methods.chita.target import Found, calibration_record, find, masks_of
from vlp_plugins.methods.method import Context, Cost, Procedure
from vlp_plugins.models.request import Target
from vlp_plugins.models.saving import restored
from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation
from vlp_plugins.scoring.factors import Factors, guided_name
from vlp_plugins.scoring.schedules import levels_of, schedule_by_name

logger = logging.getLogger("vlp_plugins.methods")

_REMEDY = "delete it and run the method from its first stage"
_FORMAT = Format("checkpoint", "vlp_stages", 1, DataError, _REMEDY)


@dataclass(frozen=True)
class ChitaRound:
    """Where a run stands after a stage.

    Attributes:
        done: number of stages done.
        support: bool `[p]`, what is kept so far.
        values: float32 `[p]`, the weights so far.
        state: what the losses have changed; see `Adapter.loss_state`.
        digests: by round, the hash of its batches, hexadecimal.
        sizes: by round, the number of samples of each of its batches.
        facts: by round, what was found.
    """

    done: int
    support: torch.Tensor
    values: torch.Tensor
    state: list[torch.Tensor]
    digests: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    facts: tuple[dict[str, Any], ...]


class ChitaRoundFile:
    """The file of one target. Process 0 writes and reads it, the others get what it read."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        """Finds the place of the file.

        Args:
            folder: None keeps no file.
            identity: what a run must have in common with the one it goes on from.
        """
        self._identity = dict(identity)
        text = json.dumps(self._identity, sort_keys=True, default=str)
        mark = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.path = None if folder is None else Path(folder) / f"stages-{mark}.safetensors"

    def save(self, stage: ChitaRound) -> None:
        """Writes a stage over the one before, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        if self.path is None or rank_and_size()[0]:
            return
        tensors = {
            "values": stage.values[stage.support].cpu(),
            "support": stage.support.cpu(),
            **{f"state.{index}": tensor.cpu() for index, tensor in enumerate(stage.state)},
        }
        header = {
            "identity": self._identity,
            "done": stage.done,
            "digests": stage.digests,
            "sizes": stage.sizes,
            "facts": stage.facts,
        }
        write_artifact(self.path, _FORMAT, tensors, header, state=True)

    def load(self, device: torch.device) -> ChitaRound | None:
        """The stage to go on from; None if there is no file.

        Raises:
            DataError: if the file is damaged.
        """
        stage = [self._read() if self.path is not None and not rank_and_size()[0] else None]
        if rank_and_size()[1] > 1:
            distributed.broadcast_object_list(stage)
        found = stage[0]
        if found is None:
            return None
        return ChitaRound(
            found.done,
            found.support.to(device),
            found.values.to(device),
            [tensor.to(device) for tensor in found.state],
            found.digests,
            found.sizes,
            found.facts,
        )

    def _read(self) -> ChitaRound | None:
        assert self.path is not None
        if not self.path.exists():
            logger.warning("no checkpoint at %s; starting from the first stage", self.path)
            return None
        tensors, header = read_artifact(self.path, _FORMAT)
        support = tensors["support"]
        values = torch.zeros(len(support))
        values[support] = tensors["values"]
        states = [name for name in tensors if name.startswith("state.")]
        return ChitaRound(
            int(header["done"]),
            support,
            values,
            [tensors[f"state.{index}"] for index in range(len(states))],
            tuple(header["digests"]),
            tuple(tuple(sizes) for sizes in header["sizes"]),
            tuple(header["facts"]),
        )


def with_factors(method: Chita | ChitaInRounds, factors: Mapping[str, float]) -> dict[str, Any]:
    """What changes in a method that gets factors.

    Raises:
        UnsupportedError: if it has some.
    """
    if method.factors is not None:
        raise UnsupportedError(f"method {method.name!r} has factors already")
    factors = Factors.of(factors)
    return {
        "name": guided_name(method.name),
        "factors": factors,
        "allocation": method.allocation.with_factors(factors),
    }


def check_factors(factors: Factors | None, settings: Settings, names: Iterable[str]) -> None:
    """Makes sure, before gradients are taken, that factors can be used.

    Args:
        factors: None: nothing to check.
        settings: of the variant.
        names: of all weights.

    Raises:
        UnsupportedError: if there are no blocks to share weights out among.
        StatisticsError: if a weight has no factor.
    """
    if factors is None:
        return
    check_importance(True, settings.effort, settings.columns_of_block)
    factors.check(names)


@dataclass(frozen=True)
class Chita(Procedure):
    """CHITA (Benbaki et al., ICML 2023): prunes by a quadratic model of the loss, updates the rest.

    Attributes:
        settings: of the solver and of what it reads.
        allocation: global, or by modality: one problem per modality.
        factors: what multiplies the magnitudes that share out the weights among blocks.
    """

    settings: Settings = field(default_factory=Settings)
    allocation: Allocation = field(default_factory=GlobalAllocation)
    name: str = "chita"
    factors: Factors | None = None

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        return {**self.settings.parameters(), **(self.factors.record() if self.factors else {})}

    def with_allocation(self, allocation: Allocation | None) -> Chita:
        if allocation is None:
            return self
        check_allocation(allocation, self.name)
        if self.factors is not None:
            allocation = allocation.with_factors(self.factors)
        return replace(self, allocation=allocation)

    def with_factors(self, factors: Mapping[str, float]) -> Chita:
        return replace(self, **with_factors(self, factors))

    def run(self, context: Context) -> list[Masks]:
        check_floor(context, self.name)
        settings = self.settings.for_variant(published=context.published)
        check_factors(self.factors, settings, context.weights)
        groups = [
            groups_of_weights(context.weights, target, self.allocation, published=context.published)
            for target in context.targets
        ]
        setup = Setup.of(context, settings, self.allocation, factors=self.factors)
        count = settings.rows or setup.calibration.available
        batches = Seen(setup.calibration.from_(0, count))
        masks = []
        with setup.pruner(batches, count, progress=context.progress) as pruner:
            for target, each in zip(context.targets, groups, strict=True):
                found = find(setup, pruner, each, str(target))
                record = calibration_record([batches.digest.hex()], [batches.sizes])
                masks.append(masks_of(setup, found, target, self.name, record))
        return masks

    def cost(self, context: Context) -> Cost:
        settings = self.settings.for_variant(published=context.published)
        check_factors(self.factors, settings, context.weights)
        return cost_of(context, settings, self.allocation)


@dataclass(frozen=True)
class RunInRounds:
    """What all targets of a run share.

    Attributes:
        method: CHITA++ as it was set.
        setup: of the run.
        rows: batches of a round.
    """

    method: ChitaInRounds
    setup: Setup
    rows: int

    def prune(self, number: int, target: Target) -> Masks:
        """All rounds of one target, from the dense model on."""
        setup, context = self.setup, self.setup.context
        file = ChitaRoundFile(context.workplace, self._identity(target))
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
        self, before: ChitaRound | None, index: int, level: Target, number: int, target: str
    ) -> ChitaRound:
        """Gradients, pruning and new weights of one round."""
        setup, context = self.setup, self.setup.context
        groups = groups_of_weights(
            context.weights, level, setup.allocation, published=context.published
        )
        batches = self._batches(index)
        alive = None if before is None else setup.columns.split(before.support)
        progress = self._progress(number, index)
        with setup.pruner(batches, self.rows, alive, progress) as pruner:
            near = None if before is None else before.facts[-1]["lambda"]
            found = find(setup, pruner, groups, f"{target}, round {index + 1}", near)
        self._pass_over(batches)
        write_values(context.weights, setup.columns.split(found.solution.values))
        facts = {"sparsity": level, "kept": int(found.solution.support.sum()), **found.facts}
        return ChitaRound(
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

    def _resumed(self, file: ChitaRoundFile) -> ChitaRound | None:
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


@dataclass(frozen=True)
class ChitaInRounds(Procedure):
    """CHITA++ (Benbaki et al., ICML 2023): CHITA in rounds.

    Each round takes gradients at the weights that the round before left, from batches of its own,
    and prunes a little more. What was removed stays removed.

    Attributes:
        settings: of the solver and of what it reads; `rows` is of one round.
        rounds: number of rounds.
        schedule: name of what leads from 0 to the target.
        allocation: global, or by modality: one problem per modality.
        factors: what multiplies the magnitudes that share out the weights among blocks.
    """

    settings: Settings = field(default_factory=Settings)
    rounds: int = DEFAULT_ROUNDS
    schedule: str = DEFAULT_SCHEDULE
    allocation: Allocation = field(default_factory=GlobalAllocation)
    name: str = "chita++"
    factors: Factors | None = None

    def __post_init__(self) -> None:
        schedule_by_name(self.schedule)
        if type(self.rounds) is not int or self.rounds < 1:
            raise UnsupportedError(f"rounds={self.rounds!r}; give a whole number from 1 on")

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        of_rounds = {"rounds": self.rounds, "schedule": self.schedule}
        factors = self.factors.record() if self.factors else {}
        return {**self.settings.parameters(), **of_rounds, **factors}

    def with_allocation(self, allocation: Allocation | None) -> ChitaInRounds:
        if allocation is None:
            return self
        check_allocation(allocation, self.name)
        if self.factors is not None:
            allocation = allocation.with_factors(self.factors)
        return replace(self, allocation=allocation)

    def with_factors(self, factors: Mapping[str, float]) -> ChitaInRounds:
        return replace(self, **with_factors(self, factors))

    def run(self, context: Context) -> list[Masks]:
        check_floor(context, self.name)
        settings = self.settings.for_variant(published=context.published)
        check_factors(self.factors, settings, context.weights)
        for target in context.targets:  # an error now is better than one after hours
            groups_of_weights(context.weights, target, self.allocation, published=context.published)
        setup = Setup.of(
            context, settings, self.allocation, rounds=self.rounds, factors=self.factors
        )
        rows = rows_of_a_round(setup.calibration, settings, self.rounds)
        run = RunInRounds(self, setup, rows)
        return [run.prune(number, target) for number, target in enumerate(context.targets)]

    def cost(self, context: Context) -> Cost:
        settings = self.settings.for_variant(published=context.published)
        check_factors(self.factors, settings, context.weights)
        return cost_of(
            context, settings, self.allocation, rounds=self.rounds, schedule=self.schedule
        )


def rows_of_a_round(calibration: Calibration, settings: Settings, rounds: int) -> int:
    """How many fresh batches a round takes; warns once if there are too few for all rounds."""
    rows = settings.rows or max(1, calibration.available // rounds)
    if rows * rounds > calibration.available:
        logger.warning(
            "%d rounds of %d batches are more than the %d there are: after the last batch comes "
            "the first again",
            rounds,
            rows,
            calibration.available,
        )
    return rows


def chita(
    *,
    lambda_: Lambda = DEFAULT_LAMBDA,
    effort: Effort = DEFAULT_EFFORT,
    block_size: BlockSize = "default",
    first_order: FirstOrder = "default",
    rows: int | None = None,
    keep_in: str = "auto",
    row_dtype: str = "float32",
    held_out: float = DEFAULT_HELD_OUT,
) -> Chita:
    """CHITA (Benbaki et al., ICML 2023): prunes by a quadratic model of the loss, updates the rest.

    Args:
        lambda_: ridge penalty above 0, or `auto`; users call it `lambda`. The result is very
            sensitive to it.
        effort: of the solver, `fast` or `best`; `published` is the support of the published one.
        block_size: columns of a block of the block-diagonal approximation; None for none.
        first_order: weight of the first-order term; True: 1 / (samples of the first batch), False:
            none. `default` is False, and True in the published variant. With that weight the model
            of the loss lets every row fall by up to 1 / samples, in every block: with batches of
            one sample this can destroy a model that is trained well, in the published solver too.
        rows: batches to take gradients of; None: all that are not held out.
        keep_in: where gradients are kept: `auto`, `ram`, `disk`, or nowhere, in several `passes`.
        row_dtype: `float32`, or `bfloat16` for half the memory and less accuracy.
        held_out: what `auto` judges by: a fraction of the batches below 1, or their number.

    Raises:
        UnsupportedError: if a value makes no sense.
    """
    return Chita(
        Settings(lambda_, effort, block_size, first_order, rows, keep_in, row_dtype, held_out)
    )


def chita_plus_plus(
    *,
    lambda_: Lambda = DEFAULT_LAMBDA,
    effort: Effort = DEFAULT_EFFORT,
    block_size: BlockSize = "default",
    first_order: FirstOrder = "default",
    rows: int | None = None,
    keep_in: str = "auto",
    row_dtype: str = "float32",
    held_out: float = DEFAULT_HELD_OUT,
    rounds: int = DEFAULT_ROUNDS,
    schedule: str = DEFAULT_SCHEDULE,
) -> ChitaInRounds:
    """CHITA++ (Benbaki et al., ICML 2023): CHITA in rounds, with fresh gradients in each.

    Args:
        lambda_: see `chita`; `auto` chooses in the first round, and near that in the others.
        effort: see `chita`.
        block_size: see `chita`.
        first_order: see `chita`.
        rows: batches of one round; None: an equal share of all that are not held out.
        keep_in: see `chita`.
        row_dtype: see `chita`.
        held_out: see `chita`.
        rounds: number of rounds.
        schedule: how sparsity rises to the target; see `vlp_plugins.scoring.schedules`.

    Raises:
        UnsupportedError: if a value makes no sense.
    """
    settings = Settings(
        lambda_, effort, block_size, first_order, rows, keep_in, row_dtype, held_out
    )
    return ChitaInRounds(settings, rounds, schedule)
