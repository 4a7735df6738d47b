"""`keep` of every `of`: the same pattern in every row of every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlp_plugins.allocation.base import Allocation, overall
from vlp_plugins.floors import check_floor
from vlp_plugins.intrinsic.factors import Factors
from vlp_plugins.models.request import Target
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError
from vlp_plugins.selection import PatternSelection, Scored, Selection


@dataclass(frozen=True)
class Pattern(Allocation):
    """`keep` of every `of` consecutive elements of a row stay, e.g. Pattern(keep=2, of=4)."""

    keep: int
    of: int
    takes_budgets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.of:
            raise SparsityError(f"a pattern keeps 1 to {self.of} of {self.of}, not {self.keep}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """`keep=2,of=4`, as `allocation_by_name` reads it."""
        return f"keep={self.keep},of={self.of}"

    @property
    def sparsity(self) -> float:
        """The sparsity that the pattern makes, whatever the scores."""
        return 1 - self.keep / self.of

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        for target in targets:
            if abs(overall(target, self.name) - self.sparsity) > 1e-9:
                raise SparsityError(
                    f"pattern {self.keep} of {self.of} makes sparsity {self.sparsity:g}, "
                    f"not {target}; leave the sparsity out"
                )
        selections: dict[str, Selection] = {}
        for name, weight in scored.weights.items():
            _, columns = weight.rows_and_columns
            if columns % self.of:
                raise SparsityError(
                    f"pattern {self.keep} of {self.of} does not divide the {columns} inputs of "
                    f"{name!r}; exclude that layer or choose another pattern"
                )
            selections[name] = PatternSelection(self.keep, self.of, weight.numel)
        check_floor(scored, selections, floor)
        return [selections for _ in targets]

    def with_factors(self, factors: Factors) -> Allocation:
        raise UnsupportedError(
            f"pattern {self.name} keeps the same fraction of every tensor, so a factor per tensor "
            "changes nothing; give another allocation, such as global or modality"
        )
