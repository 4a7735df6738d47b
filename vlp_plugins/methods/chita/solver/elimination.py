"""Backward elimination in every block: what matters least goes first, and the rest makes up for it.

The exact cost of removing a weight changes with every other one that goes. So weights go in stages,
a constant fraction of what is left each time, and after every stage the weights that are left and
the costs of losing them are computed anew: OBS (Hassibi & Stork, 1993) many weights at a time, on
CHITA's quadratic model and in its n x n dual (`solver/dual.py`). It follows the path from the
dense model down: F describes the loss well near the dense weights only, and a support far from
there may have a lower objective and still make a worse model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from vlp_plugins.methods.chita.solver.blocks import edges_of, full_objective, similar
from vlp_plugins.methods.chita.solver.gram import factor, widened
from vlp_plugins.methods.chita.solver.problem import Problem, Solution
from vlp_plugins.runtime.parallel import over_tensors

STAGES = 16

_ELEMENTS = 1 << 20  # of the blocks in work at a time: 4 MiB of float32, so that they stay in cache
_LEAST_MARGIN = 1e-6  # of 1 - h, which is positive but for rounding
_UNIT = 2.0**-24
_VISIBLE = 1e-6


def solve_elimination(problem: Problem, stages: int = STAGES) -> Solution:
    """A support by staged backward elimination inside blocks, and the exact weights on it.

    Blocks keep as many weights as magnitude leaves them. One sweep over the rows.

    Args:
        problem: with block bounds; without, everything is one block, which must be one part.
        stages: 1 removes everything at once, by the costs at the dense weights; p would be exact
            backward elimination.

    Raises:
        UnsupportedError: if the rows come in parts that cut a block.
    """
    rows = problem.rows
    largest = problem.largest()
    bounds = problem.bounds or (0, rows.p)
    support = torch.zeros_like(largest)
    values = torch.zeros_like(problem.weights, dtype=torch.float32)
    sums = problem.weights.new_zeros(rows.n + 2, dtype=torch.float64)
    for first, part in rows.parts():
        span = slice(first, first + part.shape[1])
        blocks = list(pairwise(edges_of(bounds, span.start, span.stop)))
        weights, keeps = problem.weights[span], largest[span]
        counts = torch.stack([keeps[start:stop].sum() for start, stop in blocks])
        stacked = partial(_stacked, part, weights, blocks, counts)
        eliminated = partial(_eliminated, problem, stages, stacked)
        for found in over_tensors(eliminated, _batches(blocks, len(part)), part.device):
            there = found.places >= 0
            values[span][found.places[there]] = found.values[there].float()
            support[span][found.places[there]] = True
            sums += found.sums
    support = rows.fill(support.to(torch.uint8)).bool()
    return Solution(rows.fill(values), support, full_objective(problem, rows.add_up(sums)))


@dataclass(frozen=True)
class _Stack:
    """Blocks of about one size.

    Attributes:
        places: positions in the part `[b, m]`, -1 beyond the end of a block.
        columns: float32 `[b, n, m]`, 0 beyond the end.
        dense: v, float32 `[b, m]`, 0 beyond the end.
        keeps: how many of each block stay, `[b]`.
    """

    places: torch.Tensor
    columns: torch.Tensor
    dense: torch.Tensor
    keeps: torch.Tensor


@dataclass(frozen=True)
class _Left:
    """What is left of some blocks.

    Attributes:
        places: positions in the part `[b, k]`, -1 beyond the end of a block.
        values: float64 `[b, k]`.
        sums: what the blocks add to F, see `blocks.full_objective`.
    """

    places: torch.Tensor
    values: torch.Tensor
    sums: torch.Tensor


def _batches(blocks: list[tuple[int, int]], n: int) -> list[list[int]]:
    """Positions of blocks of about one size, a few at a time."""
    sizes = [stop - start for start, stop in blocks]
    batches = []
    for group in similar(sizes):
        count = max(1, _ELEMENTS // (n * sizes[group[0]]))
        batches += [group[i : i + count] for i in range(0, len(group), count)]
    return batches


def _stacked(
    part: torch.Tensor,
    weights: torch.Tensor,
    blocks: list[tuple[int, int]],
    counts: torch.Tensor,
    batch: list[int],
) -> _Stack:
    width = max(blocks[i][1] - blocks[i][0] for i in batch)
    places = torch.full((len(batch), width), -1, device=part.device)
    columns = part.new_zeros((len(batch), len(part), width), dtype=torch.float32)
    dense = columns.new_zeros((len(batch), width))
    for at, (start, stop) in enumerate(blocks[i] for i in batch):
        places[at, : stop - start] = torch.arange(start, stop, device=part.device)
        columns[at, :, : stop - start] = widened(part[:, start:stop])
        dense[at, : stop - start] = weights[start:stop]
    return _Stack(places, columns, dense, counts[batch])


def _eliminated(
    problem: Problem, stages: int, stacked: Callable[[list[int]], _Stack], batch: list[int]
) -> _Left:
    stack = stacked(batch)
    ridge, c = problem.rows.n * problem.ridge, problem.first_order
    # What is 0 already goes first and for nothing: pruned weights are not revived, as long as
    # there are others.
    real = stack.places >= 0
    present = real & (stack.dense != 0)
    present |= real & (present.sum(1) < stack.keeps)[:, None]
    sizes = present.sum(1)
    columns = stack.columns.masked_fill_(~present[:, None], 0)
    places, dense = stack.places.masked_fill(~present, -1), stack.dense
    matrix = _gram(columns)[0]
    matrix.diagonal(dim1=1, dim2=2).add_(ridge)
    target = matrix.new_full(matrix.shape[:2], -c)
    for stage in range(1, stages + 1):
        if not dense.numel():  # nothing was to be kept
            break
        left = _left_after(sizes, stack.keeps, stage / stages)
        order = _costs(matrix, target, columns, dense, places).argsort(1, descending=True)
        ranks = torch.arange(order.shape[1], device=order.device)
        fewest, most = int(left.min()), int(left.max())
        gone = _picked(columns, dense, order[:, fewest:], ranks[fewest:] >= left[:, None])
        # Downdated in float64: over all stages every column is multiplied once more, not once a
        # stage.
        product, moved = _gram(*gone)
        matrix -= product
        target += moved
        staying = ranks[:most] < left[:, None]
        columns, dense = _picked(columns, dense, order[:, :most], staying)
        places = places.gather(1, order[:, :most]).masked_fill_(~staying, -1)
    u = torch.cholesky_solve(target[..., None], factor(matrix))[..., 0]
    shift = (columns.mT.double() @ u[..., None])[..., 0]
    # |w - v|^2 of what is left and of what is gone; A (w - v) is -r u - c by the dual.
    gone_square = stack.dense.double().square().sum() - dense.double().square().sum()
    whole = (stack.columns @ stack.dense[..., None]).sum(dtype=torch.float64)
    ends = torch.stack([shift.square().sum() + gone_square, whole])
    return _Left(places, dense.double() + shift, torch.cat(((-ridge * u - c).sum(0), ends)))


def _costs(
    matrix: torch.Tensor,
    target: torch.Tensor,
    columns: torch.Tensor,
    dense: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """The exact cost of removing each weight, up to a common factor; -1 where there is none."""
    lower = factor(matrix)
    u = torch.cholesky_solve(target[..., None], lower)
    z = dense + _shift(columns, u)
    # One product with the inverse of the small factor: twice as fast on a CPU as solving.
    identity = torch.eye(len(matrix[0]), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    h = (inverse.float() @ columns).square_().sum(1)
    return z.square_().div_((1 - h).clamp_min_(_LEAST_MARGIN)).masked_fill_(places < 0, -1)


def _shift(columns: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """A'u, float32 `[b, m]`; by way of float64 where u is so long that it would show."""
    longest = columns.square().sum(1).amax().sqrt()
    if _UNIT * float(u.norm(dim=1).max()) * float(longest) < _VISIBLE:
        return (columns.mT @ u.float())[..., 0]
    return (columns.mT.double() @ u)[..., 0].float()


def _picked(
    columns: torch.Tensor, dense: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns `[b, n, k]` and weights `[b, k]` at some places, 0 where `real` is false."""
    picked = columns.gather(2, chosen[:, None].expand(-1, columns.shape[1], -1))
    weights = dense.gather(1, chosen)
    if not bool(real.all()):
        picked.masked_fill_(~real[:, None], 0)
        weights.masked_fill_(~real, 0)
    return picked, weights


def _gram(
    columns: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A A' `[b, n, n]` and A v `[b, n]` of columns `[b, n, m]` and weights `[b, m]`, float64."""
    exact = columns.double()
    moved = exact[..., 0] if weights is None else (exact @ weights.double()[..., None])[..., 0]
    return exact @ exact.mT, moved


def _left_after(sizes: torch.Tensor, keeps: torch.Tensor, share: float) -> torch.Tensor:
    """How many are left after a share of the stages: from `sizes` to `keeps` at a constant rate.

    Where nothing is kept the rate is that of keeping one.
    """
    if share >= 1:
        return keeps
    ratio = (keeps.clamp_min(1) / sizes.clamp_min(1)).double()
    return (sizes * ratio**share).ceil().long().clamp_min(keeps)
