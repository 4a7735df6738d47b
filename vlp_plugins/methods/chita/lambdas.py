"""The ridge penalty lambda: chosen by the loss of the pruned model on held-out batches.

The best lambda spans orders of magnitude between models and sparsities, and below it the update
of the weights explodes ("collapse"): in Table 10 of the MULTIFLOW paper (Farina et al., CVPR 2024)
the same method gives everything from the best recall to none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.distributed import all_gather, batch_shard
from vlp_plugins.runtime.errors import NonFiniteError

logger = logging.getLogger("vlp_plugins.methods")


class HeldOut:
    """Batches that judge a pruned model. The same model gives the same loss every time.

    Several processes share the batches; all get the same mean.
    """

    def __init__(
        self, probe: LossProbe, batches: Sequence[Batch], first: int, *, skip_nonfinite: bool
    ) -> None:
        """Runs the dense model on them, to know which can be used.

        Args:
            probe: of the model, not attached.
            batches: on any device.
            first: index of the first of them in the calibration data, for messages and seeds.
            skip_nonfinite: leave out batches whose loss is not finite; otherwise they are an error.

        Raises:
            NonFiniteError: if the loss of the dense model on a batch, or on all, is not finite.
        """
        self._probe = probe
        self._batches = list(batches)
        self._first = first
        losses = self._losses()
        self._used = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
        bad = [first + index for index in range(len(losses)) if index not in self._used]
        if bad and (not skip_nonfinite or not self._used):
            raise NonFiniteError(
                f"the loss of the dense model on held-out batch {bad[0]} is NaN or infinite; look "
                "at that batch and at the checkpoint"
                + (
                    ", or leave such batches out with skip_nonfinite (--skip-nonfinite)"
                    if self._used
                    else ""
                )
            )
        for index in bad:
            logger.warning("left held-out batch %d out: its loss is not finite", index)
        self.dense = self._mean(losses)

    def mean_loss(self) -> float:
        """Of the model as it is now; NaN or infinite if it is on any batch."""
        return self._mean(self._losses())

    def _mean(self, losses: Sequence[float]) -> float:
        return sum(losses[index] for index in self._used) / len(self._used)

    def _losses(self) -> list[float]:
        """Of every batch, the same list in every process."""
        rank, world = batch_shard(sharded=self._probe.sharded)
        mine: dict[int, float] = {}
        with self._probe.attached(()) as probe:
            for index, batch in enumerate(self._batches):
                if index % world == rank:
                    mine[index] = probe.loss(batch, self._first + index)
                else:
                    probe.advance(batch, self._first + index)
        together = {index: loss for part in all_gather(mine) for index, loss in part.items()}
        return [together[index] for index in range(len(self._batches))]


@dataclass(frozen=True)
class Grid:
    """Lambdas in steps of half a decade, counted from one of them.

    Attributes:
        centre: step 0, above 0; with the default steps a guess of the best lambda.
        first: the step of the least lambda that is tried in any case, which are a decade apart.
        last: of the largest.
    """

    centre: float
    first: int = -2
    last: int = 2

    @property
    def steps(self) -> range:
        """What is tried in any case."""
        return range(self.first, self.last + 1, 2)

    @property
    def top(self) -> int:
        """The step of the largest lambda that the search may come to."""
        return math.floor(2 * math.log10(LARGEST * _HALF / self.centre))

    def at(self, step: int) -> float:
        """The lambda of a step."""
        return float(self.centre * 10.0 ** (step / 2))


GRID = Grid(1.0, -10, 6)
"""Of the papers, for the problem with a first-order term."""
AHEAD = 10
"""Steps below the centre that are solved at once where every sweep takes gradients again.

The best lambda is up to four decades below the guess (`python -m benchmarks.demo.chita`).
"""
SMALLEST, LARGEST = 1e-30, 1e6
"""Where the search ends. The scale of gradients differs, and a large lambda does no harm."""
OF_MEAN_SQUARE = 1e-2
"""Where it begins without a first-order term: this times the mean square of a gradient's elements.

n lambda is weighed against the eigenvalues of Gram matrices of the rows, so the best lambda scales
with the square of the gradients. Measured: `python -m benchmarks.demo.chita`.
"""
_HALF = 10**0.5
_COLLAPSED = 1.5

Found = TypeVar("Found")


@dataclass(frozen=True)
class Choice(Generic[Found]):
    """What was chosen, and between what.

    Attributes:
        lambda_: the lambda of the lowest held-out loss; of equal ones the largest.
        loss: that loss.
        found: what was solved with it.
        curve: (lambda, loss) in ascending order; a loss may be infinite or NaN.
        warnings: what is doubtful about the choice.
    """

    lambda_: float
    loss: float
    found: Found
    curve: tuple[tuple[float, float], ...]
    warnings: tuple[str, ...]


def choose_lambdas(
    solve: Callable[[Sequence[tuple[int, float]]], Iterable[Found]],
    loss: Callable[[Found], float],
    grids: Sequence[Grid],
    *,
    ahead: int = 0,
) -> list[Choice[Found]]:
    """Tries a grid of lambdas, values beyond it while that helps, and half a decade to both sides.

    Args:
        solve: prunes, given (index of a problem, lambda), in that order.
        loss: of what that found; need not be finite.
        grids: of every problem.
        ahead: how many solutions may be held because calls of `solve` are dear: all that may be
            asked for are made in one, if they are not more. The choice is the same.

    Raises:
        NonFiniteError: if no loss of a problem is finite.
    """
    searches = [_search(grid, loss) for grid in grids]
    wanted = {index: next(search) for index, search in enumerate(searches)}
    known: dict[tuple[int, int], Found] = {}
    choices: dict[int, Choice[Found]] = {}
    while wanted:
        asked = [(index, step) for index, steps in wanted.items() for step in steps]
        missing = [each for each in asked if each not in known]
        near = [each for each in _neighbourhood(missing, grids) if each not in known]
        if len(known) + len(near) <= ahead:
            known.update(zip(near, solve(_lambdas(near, grids)), strict=True))
            missing = []
        fresh = iter(solve(_lambdas(missing, grids)))
        for index, steps in list(wanted.items()):
            places = [(index, step) for step in steps]
            found = (known[each] if each in known else next(fresh) for each in places)
            try:
                wanted[index] = searches[index].send(found)
            except StopIteration as ended:
                choices[index] = ended.value
                del wanted[index]
    return [choices[index] for index in range(len(grids))]


def _lambdas(places: Sequence[tuple[int, int]], grids: Sequence[Grid]) -> list[tuple[int, float]]:
    return [(index, grids[index].at(step)) for index, step in places]


def _neighbourhood(
    asked: Sequence[tuple[int, int]], grids: Sequence[Grid]
) -> Iterator[tuple[int, int]]:
    """All that a search which asks for these steps may ask for next: far below, or all above."""
    for index, grid in enumerate(grids):
        own = [step for each, step in asked if each == index]
        if own:
            low, high = min(own), max(own)
            lowest = -AHEAD if low >= -AHEAD else low - AHEAD
            highest = grid.last if high <= grid.last else max(high, grid.top)
            yield from ((index, step) for step in range(lowest, highest + 1))


def _search(
    grid: Grid, loss: Callable[[Found], float]
) -> Generator[Sequence[int], Iterator[Found], Choice[Found]]:
    """Asks for solutions of some steps at a time, at last returns the choice."""
    curve: dict[int, float] = {}
    best: tuple[float, int, Found] | None = None

    def attempt(steps: Sequence[int]) -> Generator[Sequence[int], Iterator[Found], None]:
        nonlocal best
        found = yield steps
        for step, each in zip(steps, found, strict=True):
            value = curve[step] = loss(each)
            better = best is None or (value, -step) < (best[0], -best[1])
            if math.isfinite(value) and better:
                best = (value, step, each)

    yield from attempt(grid.steps[::-1])
    while best is None:
        if grid.at(max(curve) + 2) > LARGEST * _HALF:
            raise NonFiniteError(
                f"the loss of the pruned model on the held-out batches is NaN or infinite for "
                f"every lambda from {grid.at(min(curve)):g} to {grid.at(max(curve)):g}; prune "
                "less, or give lambda as a number"
            )
        yield from attempt([max(curve) + 2])
    while best[1] == max(curve) and grid.at(best[1] + 2) < LARGEST * _HALF:
        yield from attempt([best[1] + 2])
    while best[1] == min(curve) and grid.at(best[1] - 2) > SMALLEST / _HALF:
        yield from attempt([best[1] - 2])
    centre = best[1]
    inner = [step for step in (centre + 1, centre - 1) if min(curve) < step < max(curve)]
    yield from attempt(inner)
    value, step, found = best
    points = tuple((grid.at(each), curve[each]) for each in sorted(curve))
    return Choice(grid.at(step), value, found, points, _doubts(grid.at(step), points))


def curve_text(choice: Choice[Found], target: str) -> str:
    """The curve as lines of a log, the chosen point marked."""
    lines = [f"lambda by the held-out loss of the pruned model, sparsity {target}:"]
    for lambda_, loss in choice.curve:
        mark = "  <- chosen" if lambda_ == choice.lambda_ else ""
        lines.append(f"  {lambda_:<10.3g} {loss:.4f}{mark}")
    return "\n".join(lines)


def _doubts(chosen: float, curve: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    place = [lambda_ for lambda_, _ in curve].index(chosen)
    loss = curve[place][1]
    doubts = []
    if place == 0:
        doubts.append(
            f"the chosen lambda {chosen:g} is the smallest that was tried; a smaller one may be "
            "better: try it as a number"
        )
    if place == len(curve) - 1:
        doubts.append(
            f"the chosen lambda {chosen:g} is the largest that was tried: the update of the "
            "weights does not help here, and the method is little more than magnitude pruning; "
            "more batches may change that"
        )
    if place > 0:
        smaller, its_loss = curve[place - 1]
        if not its_loss <= _COLLAPSED * loss:
            doubts.append(
                f"the chosen lambda {chosen:g} is at the edge of the collapse: at {smaller:.3g} "
                f"the held-out loss is {its_loss:.4g} instead of {loss:.4g}; a lambda two or three "
                "times larger is safer for other data"
            )
    return tuple(doubts)
