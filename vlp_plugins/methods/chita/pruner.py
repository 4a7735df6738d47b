"""From rows of gradients to new weights: what competes with what, and one problem per group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, islice

import torch

from vlp_plugins.methods.chita.rows.plan import Columns
from vlp_plugins.methods.chita.solver.problem import Importance, Problem, Rows, Solution
from vlp_plugins.methods.chita.solver.solve import Effort, solve_all
from vlp_plugins.methods.method import Context
from vlp_plugins.models.request import Target, budget_of
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.distributed import all_reduce_min
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError
from vlp_plugins.runtime.memory import usable_bytes
from vlp_plugins.runtime.sharding import write
from vlp_plugins.scoring.allocation import (
    Allocation,
    GlobalAllocation,
    IdAllocation,
    ModalityAllocation,
)
from vlp_plugins.scoring.factors import Factors


@dataclass(frozen=True)
class Group:
    """Weights that are one problem.

    Attributes:
        names: canonical names, in the order of the adapter.
        keep: number of their elements that stay.
    """

    names: tuple[str, ...]
    keep: int


def groups_of_weights(context: Context, target: Target, allocation: Allocation) -> list[Group]:
    """One group of all weights, or one per modality.

    N - int(sparsity N) weights stay. The published code counts int((1 - sparsity) N), which
    rounding can make one less.

    Args:
        context: of the run.
        target: sparsity, by modality if the allocation is modality-wise.
        allocation: global, by modality, or `id`.

    Raises:
        SparsityError: if the target does not fit the modalities.
    """
    weights = context.weights

    def kept(sparsity: float, total: int) -> int:
        return int((1 - sparsity) * total) if context.published else total - int(sparsity * total)

    modalities = weights.by_modality()
    if isinstance(allocation, GlobalAllocation | IdAllocation):
        if isinstance(target, Mapping):
            raise SparsityError(
                f"{allocation.name} allocation takes one sparsity, not {dict(target)}; leave the "
                "allocation out, or say modality"
            )
        keep = kept(target, weights.numel)
        if isinstance(allocation, GlobalAllocation):
            return [Group(tuple(weights), keep)]
        shares = allocation.kept(weights, keep)
    else:
        shares = {
            modality: kept(sparsity, sum(weight.numel for weight in modalities[modality]))
            for modality, sparsity in budget_of(target, list(modalities)).items()
        }
    return [
        Group(tuple(weight.name for weight in members), shares[modality])
        for modality, members in modalities.items()
    ]


def check_allocation(allocation: Allocation, method: str) -> None:
    """Raises `UnsupportedError` unless sparsity is allocated globally or by modality."""
    if not isinstance(allocation, GlobalAllocation | ModalityAllocation | IdAllocation):
        raise UnsupportedError(
            f"method {method!r} shares out sparsity over all weights (global) or within "
            f"modalities (modality, id), not by allocation {allocation.name!r}"
        )


class GroupRows(Rows):
    """Some column ranges of other rows, pushed together. A sweep over them is one of all columns.

    Attributes:
        ranges: (start, stop) of the columns in the other rows, ascending, none of them empty.
    """

    def __init__(self, rows: Rows, ranges: Sequence[tuple[int, int]]) -> None:
        self._rows = rows
        self.ranges = tuple(ranges)
        self._starts = [0, *accumulate(stop - start for start, stop in ranges)]
        self.n, self.p = rows.n, self._starts[-1]

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.sweeps += 1
        for first, part in self._rows.parts():
            yield from self.own(first, part)

    @property
    def source(self) -> Rows:
        return self._rows

    def own(self, first: int, part: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        last = first + part.shape[1]
        for (start, stop), new in zip(self.ranges, self._starts, strict=False):
            left, right = max(start, first), min(stop, last)
            if left < right:
                yield new + left - start, part[:, left - first : right - first]

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._rows.add_up(tensor)

    def fill(self, vector: torch.Tensor) -> torch.Tensor:
        whole = vector.new_zeros(self._rows.p)
        put_ranges(vector, whole, self.ranges)
        return vector.copy_(take_ranges(self._rows.fill(whole), self.ranges))


def take_ranges(whole: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The entries of some ranges of a vector, pushed together."""
    return torch.cat([whole[start:stop] for start, stop in ranges])


def put_ranges(
    vector: torch.Tensor, whole: torch.Tensor, ranges: Sequence[tuple[int, int]]
) -> None:
    """Inverse of `take_ranges`: writes to these ranges of `whole`."""
    done = 0
    for start, stop in ranges:
        whole[start:stop] = vector[done : done + stop - start]
        done += stop - start


_HELD_BY_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def dense_again(weights: WeightMap, dense: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Puts the weights of a model back as they were, also after an error.

    Args:
        weights: of the model.
        dense: their values now, float32, by canonical name; no copy is made of those that float32
            holds exactly.
    """
    before = {
        name: dense[name] if weight.parameter.dtype in _HELD_BY_FLOAT32 else weight.values.clone()
        for name, weight in weights.items()
    }
    try:
        yield
    finally:
        write_values(weights, before)


def write_values(weights: WeightMap, values: Mapping[str, torch.Tensor]) -> None:
    """Writes values into the parameters, in their dtype; ties stay, for the memory is the same."""
    for name, weight in weights.items():
        with weight.changing() as parameter:
            write(parameter, values[name])


Job = tuple[Sequence[Group], float]
"""What is solved together: groups, each a problem of its own, and lambda."""


@dataclass(frozen=True)
class Pruner:
    """Everything of a problem but lambda and how many weights stay.

    Attributes:
        dense: the weights before, float32 `[p]`.
        rows: their gradients.
        columns: where weights and blocks lie.
        effort: of the solver.
        first_order: weight c of the first-order term.
        nonzero: only what is not 0 counts as kept, as in the published code.
        alive: bool `[p]`, false where a weight was removed before and stays so; None: nowhere.
        kept_in: where the rows are.
        factors: multiply the magnitudes that decide how many weights each block keeps; None: 1.
    """

    dense: torch.Tensor
    rows: Rows
    columns: Columns
    effort: Effort
    first_order: float
    nonzero: bool = False
    alive: torch.Tensor | None = None
    kept_in: str = "ram"
    factors: Factors | None = None
    _of_groups: dict[tuple[str, ...], Pruner] = field(default_factory=dict, repr=False)

    @property
    def together(self) -> bool:
        """Whether many solutions are made in one sweep, because another one costs time."""
        return self.columns.bounds is not None and self.kept_in != "ram"

    @property
    def dear(self) -> bool:
        """Whether another sweep takes all gradients again."""
        return self.together and self.kept_in == "passes"

    def solve(self, jobs: Sequence[Job]) -> Iterator[Callable[[], Solution]]:
        """Solves one problem for every group of each job.

        Rows that are not in memory are read once for all jobs whose solutions memory can hold.

        Args:
            jobs: with the same groups but for their counts; every weight is in one of them.

        Yields:
            By job, what gives its solution; the objective is the sum of those of the groups.
        """
        at_once = self.room([groups for groups, _ in jobs]) if self.together else 1
        for start in range(0, len(jobs), at_once):
            portion = jobs[start : start + at_once]
            problems = [
                self._alone(group)._problem(group.keep, ridge)
                for groups, ridge in portion
                for group in groups
            ]
            found = solve_all(problems, self.effort)
            for groups, _ in portion:
                yield partial(self._joined, groups, list(islice(found, len(groups))))

    def room(self, groups: Sequence[Sequence[Group]]) -> int:
        """How many solutions memory can hold, packed, of these counts; one at least."""
        usable = all_reduce_min(usable_bytes(torch.device("cpu"), 0))
        largest = max((sum(group.keep for group in each) for each in groups), default=0)
        return max(1, usable // packed_bytes(self.rows.p, largest, self.first_order))

    def _alone(self, group: Group) -> Pruner:
        """The columns of a group, made once."""
        if len(group.names) == len(self.columns.names):
            return self
        if group.names not in self._of_groups:
            ranges = self.columns.ranges(group.names)
            self._of_groups[group.names] = replace(
                self,
                dense=take_ranges(self.dense, ranges),
                rows=GroupRows(self.rows, ranges),
                columns=self.columns.only(group.names),
                alive=None if self.alive is None else take_ranges(self.alive, ranges),
                _of_groups={},
            )
        return self._of_groups[group.names]

    def _joined(self, groups: Sequence[Group], found: Sequence[Callable[[], Solution]]) -> Solution:
        """The solution of all groups."""
        if len(groups) == 1:
            return self._finished(found[0]())
        values = torch.zeros_like(self.dense)
        support = torch.zeros_like(self.dense, dtype=torch.bool)
        total = 0.0
        for group, solution in zip(groups, found, strict=True):
            each = self._alone(group)._finished(solution())
            ranges = self.columns.ranges(group.names)
            put_ranges(each.values, values, ranges)
            put_ranges(each.support, support, ranges)
            total += each.objective
        return Solution(values, support, total)

    def _problem(self, keep: int, ridge: float) -> Problem:
        """That of all columns."""
        columns, importance = self.columns, None
        if self.factors is not None:
            factors = tuple(self.factors.relative(name) for name in columns.names)
            importance = Importance(columns.starts, factors)
        return Problem(
            self.dense, self.rows, ridge, keep, self.first_order, columns.bounds, importance
        )

    def _finished(self, found: Solution) -> Solution:
        if self.nonzero:
            return replace(found, support=found.values != 0)
        if self.alive is None:
            return found
        return replace(found, support=stay_removed(found.support, self.alive))


def packed_bytes(p: int, keep: int, first_order: float) -> int:
    """Bytes of a solution with `keep` of `p` weights that is held while others are made."""
    return 4 * keep + p // 8 + (3 * p if first_order else 0)


def stay_removed(support: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """The support without removed weights, filled up by others that are 0, the first by position.

    Removed weights have no gradient and are 0, so a solver takes one only to fill up a count: it
    is as good as any other weight of value 0.

    Args:
        support: bool `[p]`.
        alive: bool `[p]`, at least as many true.

    Returns:
        Bool `[p]` with as many true as `support`.
    """
    revived = int((support & ~alive).sum())
    if not revived:
        return support
    support = support & alive
    support[(alive & ~support).nonzero()[:revived, 0]] = True
    return support
