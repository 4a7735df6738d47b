"""Backward elimination in every block: what matters least goes first, and the rest makes up for it.

The exact cost of removing a weight changes with every other one that goes. So weights go in stages,
a constant fraction of what is left each time, and after every stage the weights that are left and
the costs of losing them are computed again: OBS (Hassibi & Stork, 1993) many weights at a time, on
CHITA's quadratic model and in its n x n dual (`solver/dual.py`). It follows the path from
the dense model down: F describes the loss well near the dense weights only, and a support far from
there may have a lower objective and still make a worse model.
"""

from __future__ import annotations

from functools import partial

import torch

from vlp_plugins.methods.chita.solver.blocks import Part, Task, by_blocks, stacked
from vlp_plugins.methods.chita.solver.gram import factor, gram
from vlp_plugins.methods.chita.solver.problem import Problem, Solution

STAGES = 16
MANY_ROWS = 512
"""With more rows than these leverages are estimated, from that many random directions:"""
_DIRECTIONS = 128

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
    return by_blocks([Task(problem, problem.largest(), partial(eliminate, stages=stages))])[
        0
    ].solution()


def eliminate(part: Part, stages: int = STAGES) -> torch.Tensor:
    """Sets support and values of all blocks of a part; see `by_blocks`."""
    blocks = part.blocks
    keeps = torch.stack([part.support[span].sum() for span in blocks])
    part.support.zero_()

    def solve(batch: list[int]) -> torch.Tensor:
        return _eliminate_batch(part, [blocks[i] for i in batch], keeps[batch], stages)

    return part.over_blocks([span.stop - span.start for span in blocks], solve)


def _eliminate_batch(
    part: Part, blocks: list[slice], keeps: torch.Tensor, stages: int
) -> torch.Tensor:
    """The same for blocks of about one size, of which `keeps` `[b]` weights stay."""
    matrix, rows = part.matrix, part.problem.rows
    ridge, c = rows.n * part.problem.ridge, part.problem.first_order
    # `[b, n, m]`, `[b, m]`: columns, weights and their positions in the part, -1 beyond the end.
    columns = stacked([matrix[:, span].float() for span in blocks])
    whole = dense = stacked([part.weights[span].float() for span in blocks])
    start = [torch.arange(1 + s.start, 1 + s.stop, device=matrix.device) for s in blocks]
    places = stacked(start) - 1
    total = (columns @ whole[..., None]).sum(dtype=torch.float64)
    # What is 0 already goes first and for nothing: pruned weights are not revived, as long as
    # there are others.
    real = places >= 0
    present = real & (dense != 0)
    present |= real & (present.sum(1) < keeps)[:, None]
    sizes = present.sum(1)
    columns = columns.masked_fill(~present[:, None], 0)  # it may be a view of the rows
    places = places.masked_fill(~present, -1)
    system = _gram(columns, ridge)
    system.diagonal(dim1=1, dim2=2).add_(ridge)
    target = system.new_full(system.shape[:2], -c)
    for stage in range(1, stages + 1):
        if not dense.numel():  # nothing was to be kept
            break
        left = _left_after(sizes, keeps, stage / stages)
        order = _costs(system, target, columns, dense, places).argsort(1, descending=True)
        ranks = torch.arange(order.shape[1], device=order.device)
        fewest, most = int(left.min()), int(left.max())
        gone, lost = _picked(columns, dense, order[:, fewest:], ranks[fewest:] >= left[:, None])
        # Downdated in float64: over all stages every column is multiplied once more, not once a
        # stage.
        system -= _gram(gone, ridge)
        target += (gone.double() @ lost.double()[..., None])[..., 0]
        staying = ranks[:most] < left[:, None]
        columns, dense = _picked(columns, dense, order[:, :most], staying)
        places = places.gather(1, order[:, :most]).masked_fill_(~staying, -1)
    u = torch.cholesky_solve(target[..., None], factor(system))[..., 0]
    shift = (columns.mT.double() @ u[..., None])[..., 0]
    there = places >= 0
    part.values[places[there]] = (dense.double() + shift)[there].float()
    part.support[places[there]] = True
    # |w - v|^2 of what is left and of what is gone; A (w - v) is -r u - c by the dual.
    distance = shift.square().sum() + whole.double().square().sum() - dense.double().square().sum()
    return torch.cat(((-ridge * u - c).sum(0), torch.stack((distance, total))))


def _costs(
    system: torch.Tensor,
    target: torch.Tensor,
    columns: torch.Tensor,
    dense: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """The exact cost of removing each weight, up to a common factor; -1 where there is none."""
    lower = factor(system)
    u = torch.cholesky_solve(target[..., None], lower)
    z = dense + _shift(columns, u)
    if system.shape[-1] > MANY_ROWS:
        inverse = torch.linalg.solve_triangular(lower, _signs(system), upper=False, left=False)
    else:  # one product with the inverse of the small factor: twice as fast on a CPU as solving
        identity = torch.eye(len(system[0]), dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    h = (inverse.float() @ columns).square_().sum(1)
    return z.square_().div_((1 - h).clamp_min_(_LEAST_MARGIN)).masked_fill_(places < 0, -1)


def _signs(system: torch.Tensor) -> torch.Tensor:
    """Random directions `[b, k, n]`: the mean square of what they see of a vector is its own."""
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (_DIRECTIONS, system.shape[-1]), generator=draw) * 2 - 1
    return (signs.to(system) * _DIRECTIONS**-0.5).expand(len(system), -1, -1)


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


def _gram(columns: torch.Tensor, ridge: float) -> torch.Tensor:
    """A A' of columns `[b, n, m]`, float64 `[b, n, n]`."""
    if columns.shape[1] > MANY_ROWS:
        return gram(columns, ridge)
    exact = columns.double()
    return exact @ exact.mT


def _left_after(sizes: torch.Tensor, keeps: torch.Tensor, share: float) -> torch.Tensor:
    """How many are left after a share of the stages: from `sizes` to `keeps` at a constant rate.

    Where nothing is kept the rate is that of keeping one.
    """
    if share >= 1:
        return keeps
    ratio = (keeps.clamp_min(1) / sizes.clamp_min(1)).double()
    return (sizes * ratio**share).ceil().long().clamp_min(keeps)
