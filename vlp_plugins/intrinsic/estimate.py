"""An intrinsic dimension with its error, and how it is estimated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from vlp_plugins.models.request import whole_number
from vlp_plugins.runtime.errors import UnsupportedError, suggest

Fit = Literal["slope", "likelihood"]
Duplicates = Literal["rounding", "exact"]


@dataclass(frozen=True, slots=True)
class Estimator:
    """How TwoNN (Facco et al. 2017) turns distances into a dimension.

    Attributes:
        fit: `slope` of the line through the origin, as published, or the maximum `likelihood`.
        drop: fraction of the largest ratios left out of the fit, up to 0.9 (Facco et al.: 0.1).
            None leaves exactly two out of a slope, as the published code of the ICML 2024 paper
            does, and none out of a likelihood.
        blocks: 1 takes all points; B > 1 is the mean over b = 1..B of the mean over b disjoint
            random blocks (published: 20).
        seed: of NumPy's legacy generator, which permutes the points before they are cut.
        duplicates: `rounding` takes points for equal that are no further apart than the rounding
            of a forward pass, so that a sample and its copy in a batch of another size are;
            `exact` only those whose bits are, as the published code does.
    """

    fit: Fit = "slope"
    drop: float | None = None
    blocks: int = 1
    seed: int = 123
    duplicates: Duplicates = "rounding"

    def __post_init__(self) -> None:
        """Refuses what no estimator can do.

        Raises:
            UnsupportedError: for an unknown fit, or a number out of its range.
        """
        if self.fit not in get_args(Fit):
            raise UnsupportedError(
                f"fit {self.fit!r} is unknown{suggest(self.fit, [*get_args(Fit)])}"
            )
        if self.duplicates not in get_args(Duplicates):
            raise UnsupportedError(
                f"duplicates {self.duplicates!r} is unknown"
                f"{suggest(self.duplicates, [*get_args(Duplicates)])}"
            )
        if self.drop is not None and not 0 <= self.drop <= 0.9:
            raise UnsupportedError(f"drop is a fraction from 0 to 0.9, not {self.drop}")
        for name in ("blocks", "seed"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.blocks < 1:
            raise UnsupportedError(f"blocks is 1 (all points) or more, not {self.blocks}")
        if not 0 <= self.seed < 2**32:
            raise UnsupportedError(f"seed is a number from 0 to 2**32 - 1, not {self.seed}")

    def settings(self) -> dict[str, Any]:
        """What JSON can keep."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an estimator found.

    Attributes:
        dimension: intrinsic dimension.
        error: its standard error.
        used: points whose ratio entered the fit on all points.
        block_dimensions: for b = 1..B the mean over b blocks; a single one on all points.
        block_deviations: the population standard deviation over those blocks.
        duplicates: points that equal another one, and have no ratio.
    """

    dimension: float
    error: float
    used: int
    block_dimensions: tuple[float, ...]
    block_deviations: tuple[float, ...]
    duplicates: int = 0
