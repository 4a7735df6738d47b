"""Backward elimination in every block: what matters least goes first, and the rest makes up for it.

The exact cost of removing a weight changes with every other one that goes. So weights go in stages,
a constant fraction of what is left each time, and after every stage the weights that are left and
the costs of losing them are computed again: OBS (Hassibi & Stork, 1993) many weights at a time, on
CHITA's quadratic model and in its n x n dual (`solver/dual.py`). It follows the path from
the dense model down: F describes the loss well near the dense weights only, and a support far from
there may have a lower objective and still make a worse model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlp_plugins.methods.chita.solver.blocks import Part, stacked
from vlp_plugins.methods.chita.solver.dual import factor, gram, symmetric

STAGES = 16
MANY_ROWS = 512
"""With more rows than these leverages are estimated, from that many random directions:"""
_DIRECTIONS = 128

_ELEMENTS = 1 << 20  # in work at a time
_HELD = 1 << 28
"""Bytes of Gram matrices that are kept while one lambda after the other is tried."""
_LEAST_MARGIN = 1e-6  # of 1 - h, which is positive but for rounding
_UNIT = 2.0**-24
_VISIBLE = 1e-6


def eliminate(part: Part, stages: int = STAGES) -> torch.Tensor:
    """Sets support and values of all blocks of a part; see `by_blocks`.

    Args:
        part: whole blocks; each keeps as many weights as its support has.
        stages: 1 removes everything at once, by the costs at the dense weights; p would be exact
            backward elimination.
    """
    blocks = part.blocks
    keeps = torch.stack([part.support[span].sum() for span in blocks])
    part.support.zero_()

    def solve(batch: list[int]) -> torch.Tensor:
        return _eliminate_batch(part, [blocks[i] for i in batch], keeps[batch], stages)

    return part.over_blocks([span.stop - span.start for span in blocks], solve)


def held_bytes(n: int, blocks: int, problems: int) -> int:
    """The most that n rows of so many blocks, of all problems, keep between two solutions."""
    whole = torch.float64.itemsize * n**2 * blocks
    return min(problems * _HELD, whole) if n > MANY_ROWS else 0


@dataclass
class _Left:
    """The columns of some blocks that are left; 0 beyond the end of a block, as all that follows.

    Attributes:
        columns: `[b, w, n]` float32 (float64 `[b, w, w]` once `turned`), one column after the
            other, so that picking some copies whole lines. Room for all of the start; the first m
            are left.
        weights: dense weights `[b, m]`.
        places: of the columns in the part, `[b, m]`, -1 beyond the end.
        squares: squared lengths of the columns, `[b, m]`.
    """

    columns: torch.Tensor
    weights: torch.Tensor
    places: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, part: Part, blocks: list[slice]) -> _Left:
        """All columns of blocks of about one size."""
        width, n = max(s.stop - s.start for s in blocks), len(part.matrix)
        columns = part.matrix.new_zeros((len(blocks), width, n), dtype=torch.float32)
        for into, span in zip(columns, blocks, strict=True):
            into[: span.stop - span.start] = part.matrix[:, span].mT
        device = columns.device
        start = [torch.arange(1 + s.start, 1 + s.stop, device=device) for s in blocks]
        weights = stacked([part.weights[span].float() for span in blocks])
        squares = torch.linalg.vector_norm(columns, dim=2).square_()
        return cls(columns, weights, stacked(start) - 1, squares)

    def turned(self) -> torch.Tensor:
        """Turns the rows so that as many as columns say all; returns Q `[b, n, w]` of A = Q R."""
        basis, upper = torch.linalg.qr(self.columns.double().mT)
        self.columns = upper.mT.contiguous()
        return basis

    @property
    def there(self) -> torch.Tensor:
        """`[b, m, n]`, a view."""
        return self.columns[:, : self.weights.shape[1]]

    def picked(self, chosen: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The columns at some places `[b, k]`, 0 where `real` is false; `[b, k, n]`."""
        blocks, width = self.columns.shape[:2]
        lines = chosen + width * torch.arange(blocks, device=chosen.device)[:, None]
        found = self.columns.flatten(0, 1).index_select(0, lines.flatten())
        found = found.unflatten(0, chosen.shape)
        return found if bool(real.all()) else found.masked_fill_(~real[..., None], 0)

    def keep(self, chosen: torch.Tensor, real: torch.Tensor) -> None:
        """Leaves the columns at these places only, where `real` is true."""
        if chosen.shape[1] <= self.step:
            self.columns = self.picked(chosen, real)
        else:  # in place: ascending, none moves to the right, and fresh memory is slow
            beyond = self.weights.shape[1]
            chosen = chosen.masked_fill(~real, beyond).sort(1).values
            real, chosen = chosen < beyond, chosen.clamp_max(beyond - 1)
            for first in range(0, chosen.shape[1], self.step):
                some = slice(first, min(first + self.step, chosen.shape[1]))
                self.columns[:, some] = self.picked(chosen[:, some], real[:, some])
        self.weights = self.weights.gather(1, chosen).masked_fill_(~real, 0)
        self.squares = self.squares.gather(1, chosen).masked_fill_(~real, 0)
        self.places = self.places.gather(1, chosen).masked_fill_(~real, -1)

    @property
    def step(self) -> int:
        """Columns in work at a time: what is made of them stays in cache."""
        return max(1, _ELEMENTS // (len(self.columns) * self.columns.shape[2]))

    def shift(self, u: torch.Tensor) -> torch.Tensor:
        """A'u `[b, m]` of u `[b, n]`, in float64 for a u in float64."""
        pieces = self.there.split(self.step, dim=1)
        return torch.cat([(piece.to(u) @ u[..., None])[..., 0] for piece in pieces], 1)


def _eliminate_batch(
    part: Part, blocks: list[slice], keeps: torch.Tensor, stages: int
) -> torch.Tensor:
    """The same for blocks of about one size, of which `keeps` `[b]` weights stay."""
    rows, c = part.problem.rows, part.problem.first_order
    ridge = rows.n * part.problem.ridge
    left = _Left.of(part, blocks)
    dense = left.weights.double().square().sum()
    total = dense.new_zeros(())
    if c:
        total = (left.columns.mT @ left.weights[..., None]).sum(dtype=torch.float64)
    ones, basis = dense.new_ones(left.columns.shape[::2]), None
    if 2 * left.columns.shape[1] <= rows.n:  # systems of the size of the block, not of the rows
        basis = left.turned()
        ones = basis.sum(1)
    # What is 0 already goes first and for nothing: pruned weights are not revived, as long as
    # there are others.
    real = left.places >= 0
    present = real & (left.weights != 0)
    present |= real & (present.sum(1) < keeps)[:, None]
    sizes = present.sum(1)
    if not bool(present.all()):
        order = present.byte().argsort(1, descending=True)[:, : int(sizes.max())]
        left.keep(order, present.gather(1, order))
    system = _first_gram(part, blocks, left)
    system.diagonal(dim1=1, dim2=2).add_(ridge)
    target = -c * ones
    for stage in range(1, stages + 1):
        if not left.weights.numel():  # nothing was to be kept
            break
        counts = _left_after(sizes, keeps, stage / stages)
        order = _costs(system, target, left).argsort(1, descending=True)
        ranks = torch.arange(order.shape[1], device=order.device)
        fewest, most = int(counts.min()), int(counts.max())
        # Downdated in float64: over all stages every column is multiplied once more, not once a
        # stage.
        going, real = order[:, fewest:], ranks[fewest:] >= counts[:, None]
        gone, zero = left.picked(going, real), left.weights.new_zeros(())
        squares = torch.where(real, left.squares.gather(1, going), zero)
        system -= _gram(gone, ridge, squares.sum(1))
        lost = torch.where(real, left.weights.gather(1, going), zero)
        target += (gone.double().mT @ lost.double()[..., None])[..., 0]
        left.keep(order[:, :most], ranks[:most] < counts[:, None])
    u = torch.cholesky_solve(target[..., None], factor(system))[..., 0]
    shift = left.shift(u)
    there = left.places >= 0
    part.values[left.places[there]] = (left.weights.double() + shift)[there].float()
    part.support[left.places[there]] = True
    # |w - v|^2 of what is left and of what is gone; A (w - v) is -r u - c by the dual.
    distance = shift.square().sum() + dense - left.weights.double().square().sum()
    moved = -ridge * u - c * ones
    if basis is not None:
        moved = (basis @ moved[..., None])[..., 0]
    return torch.cat((moved.sum(0), torch.stack((distance, total))))


def _first_gram(part: Part, blocks: list[slice], left: _Left) -> torch.Tensor:
    """Of all columns, `[b, n, n]`; of many rows it is kept for the next lambda."""
    if left.columns.shape[2] <= MANY_ROWS:
        return _gram(left.there, part.problem.ridge, left.squares.sum(1))
    held = part.problem.rows.held
    key = [part.columns.start + edge for span in blocks for edge in (span.start, span.stop)]
    places, system = held.get(tuple(key), (None, None))
    if system is None or places is None or not torch.equal(places, left.places):
        system = torch.stack([symmetric(each.double().mT) for each in left.there])
        # Other threads add theirs meanwhile.
        room = _HELD - sum(each.nbytes for _, each in list(held.values()))
        if system.nbytes <= room:
            held[tuple(key)] = (left.places, system)
    return system.clone()


def _costs(system: torch.Tensor, target: torch.Tensor, left: _Left) -> torch.Tensor:
    """The exact cost of removing each weight, up to a common factor; -1 where there is none."""
    lower = factor(system)
    u = torch.cholesky_solve(target[..., None], lower)[..., 0]
    # By way of float64 where u is so long that it would show.
    longest = float(left.squares.amax().sqrt())
    visible = not _UNIT * float(u.norm(dim=1).max()) * longest < _VISIBLE
    z = left.weights + left.shift(u if visible else u.float()).float()
    if system.shape[-1] > MANY_ROWS:
        inverse = torch.linalg.solve_triangular(lower, _signs(system), upper=False, left=False)
    else:  # one product with the inverse of the small factor: twice as fast on a CPU as solving
        identity = torch.eye(len(system[0]), dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    h = (left.there @ inverse.to(left.columns.dtype).mT).square_().sum(2)
    return z.square_().div_((1 - h).clamp_min_(_LEAST_MARGIN)).masked_fill_(left.places < 0, -1)


def _signs(system: torch.Tensor) -> torch.Tensor:
    """Random directions `[b, k, n]`: the mean square of what they see of a vector is its own."""
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (_DIRECTIONS, system.shape[-1]), generator=draw) * 2 - 1
    return (signs.to(system) * _DIRECTIONS**-0.5).expand(len(system), -1, -1)


def _gram(columns: torch.Tensor, ridge: float, squares: torch.Tensor) -> torch.Tensor:
    """A A' of columns `[b, m, n]` with these sums of squares `[b]`, float64 `[b, n, n]`."""
    if columns.shape[2] > MANY_ROWS:
        return gram(columns.mT, ridge, squares)
    exact = columns.double()
    return exact.mT @ exact


def _left_after(sizes: torch.Tensor, keeps: torch.Tensor, share: float) -> torch.Tensor:
    """How many are left after a share of the stages: from `sizes` to `keeps` at a constant rate.

    Where nothing is kept the rate is that of keeping one.
    """
    if share >= 1:
        return keeps
    ratio = (keeps.clamp_min(1) / sizes.clamp_min(1)).double()
    return (sizes * ratio**share).ceil().long().clamp_min(keeps)
