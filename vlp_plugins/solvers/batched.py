"""The exact weights of blocks, many factorised at a time: for GPUs, and for small blocks."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from vlp_plugins.solvers.columns import gram, pick_columns
from vlp_plugins.solvers.problem import Problem
from vlp_plugins.solvers.systems import block_sums, solve_systems

_PADDING = 1.5


def solve_batch(
    problem: Problem,
    part: torch.Tensor,
    weights: torch.Tensor,
    inside: torch.Tensor,
    blocks: list[tuple[int, int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimisers by batched Cholesky; arguments and result as of `blocks.solve_blocks`.

    Args:
        problem: what the part belongs to.
        part: `[n, m]`, floating.
        weights: v `[m]`.
        inside: bool `[m]`, the support.
        blocks: first column and the one after the last of every block.
    """
    values = torch.zeros_like(weights, dtype=torch.float32)
    sums = weights.new_zeros(len(part) + 2, dtype=torch.float64)
    everywhere = torch.arange(len(weights), device=weights.device)
    chosen = inside.nonzero()[:, 0]
    stops = torch.tensor([stop for _, stop in blocks], device=weights.device)
    # A GPU is waited for once, not for every block.
    ends = [0, *torch.searchsorted(chosen, stops).tolist()]
    for batch in similar([stop - start for start, stop in blocks]):
        columns = [everywhere[slice(*blocks[i])] for i in batch]
        kept = [chosen[ends[i] : ends[i + 1]] for i in batch]
        ridge, c = problem.rows.n * problem.ridge, problem.first_order

        pruned, v_pruned = _padded(part, weights.masked_fill(inside, 0), columns)
        targets = (pruned @ v_pruned[..., None])[..., 0].double() - c
        if c:
            dense = pad_sequence([weights[piece] for piece in columns], batch_first=True)
            moved = pruned @ dense[..., None].to(pruned.dtype)
            sums[-1] += moved.sum(dtype=torch.float64)
        matrices, v_kept = _padded(part, weights, kept)
        solutions = solve_systems(gram(matrices, ridge), targets, ridge)
        found = v_kept.double() + (matrices.mT.double() @ solutions[..., None])[..., 0]
        for piece, row in zip(kept, found, strict=True):
            values[piece] = row[: len(piece)].float()
        sums[:-1] += block_sums(solutions, targets, ridge, c)
        sums[-2] += v_pruned.double().square().sum()
    return values, sums


def similar(sizes: list[int]) -> list[list[int]]:
    """Groups of blocks of about one size, so that padding them to the largest costs little.

    Args:
        sizes: columns of every block.

    Returns:
        Positions in `sizes`, every one once.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        if groups and sizes[groups[-1][0]] <= _PADDING * sizes[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _padded(
    part: torch.Tensor, vector: torch.Tensor, pieces: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns `[b, n, k]` and entries `[b, k]` of every piece, zero beyond its end."""
    places = pad_sequence(pieces, batch_first=True, padding_value=0)
    ends = torch.tensor([len(piece) for piece in pieces], device=part.device)
    there = torch.arange(places.shape[1], device=part.device) < ends[:, None]
    columns = pick_columns(part, places.flatten()).unflatten(1, places.shape)
    entries = vector[places].to(columns.dtype) * there
    return (columns * there).transpose(0, 1), entries
