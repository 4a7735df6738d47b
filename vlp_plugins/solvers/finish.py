"""The last sweep of a search: the weights, and proof that magnitude does no better."""

from __future__ import annotations

import torch

from vlp_plugins.solvers.columns import pick_columns
from vlp_plugins.solvers.dual import Dual
from vlp_plugins.solvers.problem import Problem, Solution


def finish(
    problem: Problem, dual: Dual, support: torch.Tensor, magnitude: torch.Tensor
) -> Solution:
    """The minimiser on a support, or on that of the largest weights if that could be better.

    One sweep over the rows gives the weights and the proof: with z = v + A'u of the dual of S, F of
    any other support T is at least F_S + r/2 (sum of z_j^2 over S - sum of z_j^2 over T). Two more
    sweeps follow where this does not decide.

    Args:
        problem: see `Problem`; its blocks play no part.
        dual: of `support`.
        support: bool `[p]`.
        magnitude: bool `[p]`, the `keep` largest dense weights.
    """
    values = torch.zeros_like(problem.weights, dtype=torch.float32)
    ahead = torch.zeros((), dtype=torch.float64, device=values.device)
    for start, part in problem.rows.parts():
        columns = slice(start, start + part.shape[1])
        weights, found = problem.weights[columns], values[columns]
        inside, usual = support[columns], magnitude[columns]
        chosen = inside.nonzero()[:, 0]
        found[chosen] = dual.refit(pick_columns(part, chosen), weights[chosen])
        ahead += found.masked_fill(usual, 0).double().square().sum()
        others = (usual & ~inside).nonzero()[:, 0]
        refused = dual.refit(pick_columns(part, others), weights[others])
        ahead -= refused.double().square().sum()
    values, ahead = problem.rows.fill(values), problem.rows.add_up(ahead)
    if float(ahead) < 0:
        usual_dual = Dual.of(problem, magnitude)
        if usual_dual.objective < dual.objective:
            return Solution(usual_dual.values(problem, magnitude), magnitude, usual_dual.objective)
    return Solution(values, support, dual.objective)
