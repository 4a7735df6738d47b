"""CHITA in one shot and CHITA++ in rounds, as users name them.

To read on, in the order of a run: `setup.py` (batches, rows, a lambda for every target, masks),
`rows/gradients.py` (gradients become rows), `lambdas.py` (how lambda is chosen), `pruner.py` (one
problem per group of weights), `solver/problem.py` (what is minimised), `solver/elimination.py`
(how, by default). The other files are for scarce memory (`rows/`), other efforts (`solver/`), plans
(`cost.py`) and the walk by blocks (`layerwise.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.cost import cost_of
from vlp_plugins.methods.chita.layerwise import LayerChita
from vlp_plugins.methods.chita.pruner import check_allocation, groups_of_weights, write_values
from vlp_plugins.methods.chita.settings import (
    DEFAULT_EFFORT,
    DEFAULT_GRADIENT_WEIGHT,
    DEFAULT_HELD_OUT,
    DEFAULT_LAMBDA,
    DEFAULT_ROUNDS,
    DEFAULT_SCHEDULE,
    BlockSize,
    FirstOrder,
    Lambda,
    Settings,
)
from vlp_plugins.methods.chita.setup import (
    Pruned,
    Setup,
    Wanted,
    calibration_record,
)
from vlp_plugins.methods.chita.solver.problem import Solution
from vlp_plugins.methods.chita.solver.solve import Effort, check_importance
from vlp_plugins.methods.method import Context, Cost, Factored, Method, Procedure
from vlp_plugins.methods.reconstruction.method import Reconstruction
from vlp_plugins.methods.rounds import InRounds, Progress, RecordedBatches, RunInRounds
from vlp_plugins.models.request import Target
from vlp_plugins.runtime.checkpoint import state_tensor
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError
from vlp_plugins.runtime.untrusted import read_as
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.factors import Factors, guided_name
from vlp_plugins.scoring.schedules import schedule_by_name


@dataclass(frozen=True)
class Chita(Factored, Procedure):
    """CHITA (Benbaki et al., ICML 2023): prunes by a quadratic model of the loss, updates the rest.

    Block by block it is another method, see `LayerChita`.

    Attributes:
        settings: of the solver and of what it reads.
        allocation: global, or by modality: one problem per modality.
        name: in masks and reports.
        factors: multiply the magnitudes that decide how many weights each block keeps.
        gradient_weight: of gradients against the Gram matrix, in a walk by blocks.
    """

    changes_weights: ClassVar[bool] = True
    takes_gradients = True
    relative_cost = "3, and a solver"

    settings: Settings = field(default_factory=Settings)
    allocation: Allocation = Procedure.allocation
    name: str = "chita"
    factors: Factors | None = None
    gradient_weight: float = DEFAULT_GRADIENT_WEIGHT

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        return {**self.settings.parameters(), **(self.factors.record() if self.factors else {})}

    def with_allocation(self, allocation: Allocation | None) -> Self:
        if allocation is not None:
            check_allocation(allocation, self.name)
        return super().with_allocation(allocation)

    def with_factors(self, factors: Mapping[str, float]) -> Self:
        return replace(super().with_factors(factors), name=guided_name(self.name))

    def for_walk(self, walk: str | None) -> Method:
        """Itself, or the composition that walks by blocks.

        Raises:
            UnsupportedError: if a setting, or factors, are none of that walk.
        """
        if walk != "blocks":
            if self.gradient_weight != DEFAULT_GRADIENT_WEIGHT:
                raise UnsupportedError(
                    f"gradient_weight={self.gradient_weight!r} weighs gradients against the Gram "
                    "matrix of a layer, which walk='blocks' alone reads; leave it out, or walk so"
                )
            return self
        if self.factors is not None:
            raise UnsupportedError(
                f"method {self.name!r} has factors for the problem of the whole model; with "
                "walk='blocks' leave them out here, and give method='id*chita' with an id_profile"
            )
        settings = self.settings
        settings.check_layers(self.name)
        solver = LayerChita(
            gradient_weight=self.gradient_weight,
            rows=settings.rows,
            row_dtype=settings.row_dtype,
        )
        # The default is another one by blocks, but who asks for a global allocation gets it.
        asked = None if self.allocation is Procedure.allocation else self.allocation
        return Reconstruction.by(solver).with_allocation(asked)

    def run(self, context: Context) -> list[Masks]:
        settings = self.settings_for(context)
        groups = [groups_of_weights(context, target, self.allocation) for target in context.targets]
        setup = Setup.of(context, settings, self.allocation, factors=self.factors)
        batches = RecordedBatches(setup.calibration.of_round(0))
        with setup.pruner(batches, progress=context.progress) as pruner:
            record = calibration_record([batches.digest], [batches.sizes])
            wanted = [Wanted(*each) for each in zip(groups, map(str, context.targets), strict=True)]
            return [
                setup.masks_of(pruned, target, self.name, record)
                for target, pruned in zip(context.targets, setup.find(pruner, wanted), strict=True)
            ]

    def cost(self, context: Context) -> Cost:
        return cost_of(context, self.settings_for(context), self.allocation)

    def settings_for(self, context: Context) -> Settings:
        """The settings of the variant; what cannot work shows here, before gradients are taken.

        Raises:
            SparsityError: if a floor was asked for, which the solver cannot keep.
            UnsupportedError: if there are factors, but no blocks that they could favour.
            StatisticsError: if a weight has no factor.
        """
        if context.floor:
            raise SparsityError(
                f"method {self.name!r} has no floor ({context.floor:g} was asked for): its solver "
                "decides by the curvature of the loss alone; leave the floor out"
            )
        settings = self.settings.for_variant(published=context.published)
        if self.factors is not None:
            check_importance(True, settings.effort, settings.columns_of_block)
            self.factors.check(context.weights)
        return settings


@dataclass(frozen=True)
class ChitaInRounds(Chita, InRounds):
    """CHITA++ (Benbaki et al., ICML 2023): CHITA in rounds.

    Each round takes gradients at the weights that the round before left, from batches of its own,
    and prunes a little more. What was removed stays removed.

    Attributes:
        rounds: number of rounds; `settings.rows` is of one of them.
        schedule: name of what leads from 0 to the target.
    """

    relative_cost = "3 per sparsity, and a solver"

    name: str = "chita++"
    rounds: int = DEFAULT_ROUNDS
    schedule: str = DEFAULT_SCHEDULE

    def for_walk(self, walk: str | None) -> Method:
        return self

    def __post_init__(self) -> None:
        schedule_by_name(self.schedule)
        if type(self.rounds) is not int or self.rounds < 1:
            raise UnsupportedError(f"rounds={self.rounds!r}; give a whole number from 1 on")

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        return {**super().parameters, "rounds": self.rounds, "schedule": self.schedule}

    def run(self, context: Context) -> list[Masks]:
        settings = self.settings_for(context)
        for target in context.targets:  # an error now is better than one after hours
            groups_of_weights(context, target, self.allocation)
        setup = Setup.of(
            context, settings, self.allocation, rounds=self.rounds, factors=self.factors
        )
        rows, dense = setup.calibration.rows, context.weights.content_hash()
        return [
            ChitaRun(self, context, number, rows, dense, setup).masks()
            for number in range(len(context.targets))
        ]

    def cost(self, context: Context) -> Cost:
        settings = self.settings_for(context)
        return cost_of(
            context, settings, self.allocation, rounds=self.rounds, schedule=self.schedule
        )


@dataclass(frozen=True)
class Stage:
    """What the rounds so far found.

    Attributes:
        solution: of the last one.
        facts: by round, lambda and the like.
    """

    solution: Solution
    facts: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class ChitaRun(RunInRounds[Stage]):
    """A round takes gradients, prunes by them and writes new weights.

    Attributes:
        method: CHITA++ as it was set.
        setup: of the run, shared by all targets.
    """

    unit = "stage"
    method: ChitaInRounds
    setup: Setup

    def batches(self, index: int) -> RecordedBatches:
        return RecordedBatches(self.setup.calibration.of_round(index))

    def round(
        self, index: int, level: Target, batches: RecordedBatches, before: Stage | None
    ) -> Stage:
        setup, context = self.setup, self.context
        groups = groups_of_weights(context, level, setup.allocation)
        alive = None if before is None else setup.columns.split(before.solution.support)
        with setup.pruner(batches, alive, self.progress(index)) as pruner:
            near = None if before is None else before.facts[-1]["lambda"]
            wanted = Wanted(groups, f"{self.target}, round {index + 1}", near)
            [pruned] = setup.find(pruner, [wanted])
        self._pass_over(batches)
        kept = int(pruned.solution.support.sum())
        facts = {"sparsity": level, "kept": kept, **pruned.facts}
        return Stage(pruned.solution, (*(before.facts if before else ()), facts))

    def write(self, found: Stage) -> None:
        write_values(self.context.weights, self.setup.columns.split(found.solution.values))

    def pack(self, found: Stage) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        support = found.solution.support
        values = found.solution.values[support].cpu()
        return {"values": values, "support": support.cpu()}, {"facts": found.facts}

    def unpack(self, tensors: dict[str, torch.Tensor], content: Mapping[str, Any]) -> Stage:
        columns, device = self.setup.columns, self.setup.device
        support = state_tensor(tensors, "support", torch.zeros(columns.p, dtype=torch.bool))
        values = torch.zeros(len(support))
        values[support] = state_tensor(tensors, "values", values[support])
        facts = read_as(tuple[dict[str, Any], ...], content["facts"], "facts")
        for name in ("lambda", "objective"):
            read_as(float, facts[-1].get(name), name)
        solution = Solution(values.to(device), support.to(device), facts[-1]["objective"])
        return Stage(solution, facts)

    def result(self, found: Stage, progress: Progress[Stage]) -> Masks:
        facts = {**found.facts[-1], "stages": list(found.facts)}
        more = {"rounds": self.method.rounds, "schedule": self.method.schedule}
        record = calibration_record(progress.digests, progress.sizes)
        pruned = Pruned(found.solution, facts)
        return self.setup.masks_of(pruned, self.target, self.method.name, record, more)

    def identity(self) -> dict[str, Any]:
        parameters = {**self.method.parameters, **self.setup.settings.parameters()}
        return {**super().identity(), "parameters": parameters}

    def _pass_over(self, batches: RecordedBatches) -> None:
        """Leaves the loss state as the losses of a round do, at the weights of its gradients.

        Gathering rows puts it back, because it may take several passes over the batches.
        """
        context = self.context
        if not list(context.adapter.loss_state(context.model)):
            return
        with self.setup.probe.attached((), keep_state=True) as probe:
            for index, batch in enumerate(batches()):
                probe.advance(batch, index)


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
    gradient_weight: float = DEFAULT_GRADIENT_WEIGHT,
) -> Chita:
    """CHITA (Benbaki et al., ICML 2023): remove by a quadratic model of the loss, update the rest.

    With `walk="blocks"` each layer is a problem of its own, of the Gram matrix of its inputs behind
    pruned blocks and of its gradients in the dense model. Its allocation is `layer` then (every
    layer loses the same fraction), its cost 5 per sparsity, and a solver. The gradients of as many
    blocks as `memory_budget` holds are taken in one pass over the data.

    Args:
        lambda_: ridge penalty above 0, or `auto`: chosen on batches that are held out. The result
            is very sensitive to it.
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
        gradient_weight: with `walk="blocks"` that of the gradients, from 0 on, below 1; the Gram
            matrix has the rest. 0 takes no gradients. That walk also takes `rows` (the number of
            batches to take gradients of, at most) and `row_dtype`; it has none of the other
            parameters.

    Raises:
        UnsupportedError: if a value makes no sense.
    """
    settings = Settings(
        lambda_, effort, block_size, first_order, rows, keep_in, row_dtype, held_out
    )
    return Chita(settings, gradient_weight=gradient_weight)


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
    return ChitaInRounds(settings, rounds=rounds, schedule=schedule)
