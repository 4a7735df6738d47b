"""OWL: blocks with more outliers among their scores keep more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.sharding import OnDemand
from vlp_plugins.scoring.allocation import shares
from vlp_plugins.scoring.budgets import Group, GroupAllocation, Groups
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.scoring.selection import Scored
from vlp_plugins.scoring.wanda import Wanda

_LEAST = 0.01


@dataclass(frozen=True)
class Owl(GroupAllocation):
    """OWL (Yin et al., ICML 2024): sparsity of a block by its share of outlying Wanda scores.

    An outlier is a score above M times the mean of its block. Shares are brought to 0 to 2 lambda,
    and a block's sparsity is the target minus how far its share is above their mean. Whatever score
    the method has, this reads Wanda's.

    Example:
        masks = vlp.prune(model, data, method="wanda", allocation="owl", sparsity=0.7)

    Attributes:
        M: how many means an outlier exceeds.
        lambda_: half of the range of the sparsities; `lambda` in text.
    """

    M: float = 5.0
    lambda_: float = 0.08

    name: ClassVar[str] = "owl"
    score: ClassVar[Scorer | None] = Wanda()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, most in (("M", self.M, 1e6), ("lambda", self.lambda_, 0.5)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= most:
                raise UnsupportedError(
                    f"allocation 'owl': {name}={value!r}; give a number above 0, at most {most:g} "
                    "(the paper: M=5, lambda=0.08)"
                )

    def importances(self, scored: Scored) -> dict[Group, float]:
        return {
            group: outlier_fraction(OnDemand(names, scored.scores), self.M)
            for group, names in self.groups_of(scored.weights).items()
        }

    def sparsities(self, groups: Groups, sparsity: float) -> list[float]:
        found = owl_sparsities(groups.importances, sparsity, self.lambda_)
        return [value if value > 0 else _LEAST for value in found]

    def kept(self, groups: Groups, keep: int, sparsity: float) -> list[int]:
        found = owl_sparsities(groups.importances, sparsity, self.lambda_)
        least = (1 - sparsity) / 10  # quirk owl-O3: nothing else keeps a block from emptying
        wanted = [
            size * max(1 - value, least) for size, value in zip(groups.sizes, found, strict=True)
        ]
        return shares(keep, wanted, groups.least, groups.sizes)

    def record(self) -> dict[str, Any]:
        return {**super().record(), "M": self.M, "lambda": self.lambda_}


def owl_sparsities(outliers: Sequence[float], sparsity: float, lambda_: float) -> list[float]:
    """Sparsity of every block, by its share of outliers in any unit; their mean is `sparsity`.

    Equal shares give equal sparsities (the published code divides by zero: quirk owl-O2). Nothing
    keeps them within 0 and 1.
    """
    low, high = min(outliers), max(outliers)
    if high == low:
        return [sparsity] * len(outliers)
    spread = [(each - low) / (high - low) * 2 * lambda_ for each in outliers]
    mean = sum(spread) / len(spread)
    return [sparsity - (each - mean) for each in spread]


def outlier_fraction(scores: Mapping[str, torch.Tensor], multiple: float) -> float:
    """The fraction of all scores of a block that exceed a multiple of their mean.

    Args:
        scores: of its tensors, of any shape; each is asked for twice.
        multiple: `M` of `Owl`.
    """
    total, numel = 0.0, 0
    for each in scores.values():
        total += float(each.double().sum())
        numel += each.numel()
    limit = multiple * total / numel
    return sum(int((each > limit).sum()) for each in scores.values()) / numel
