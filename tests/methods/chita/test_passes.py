"""Counters, not clocks: how often gradients are taken and rows are read."""

from __future__ import annotations

import pytest
import torch
from chita_runs import context_of, pruned_weights
from toy_loss import LosingAdapter

from vlp_plugins.methods.chita.lambdas import Grid, HeldOut, choose_lambdas
from vlp_plugins.methods.chita.method import chita
from vlp_plugins.methods.chita.pruner import Pruner
from vlp_plugins.methods.chita.rows.stores import FileStore
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.methods.chita.solver.published import solve_published
from vlp_plugins.scoring.allocation import ModalityAllocation

TARGETS = [0.5, 0.75, 0.9]
BLOCK = 100
BUDGET = 9_000
"""Of bytes: several groups of columns."""


@pytest.fixture
def gradients(monkeypatch) -> list[int]:
    """Gets an entry for every gradient that is taken."""
    taken: list[int] = []
    original = LosingAdapter.losses

    def losses(self, model, batch, **options):
        if torch.is_grad_enabled():
            taken.append(1)
        return original(self, model, batch, **options)

    monkeypatch.setattr(LosingAdapter, "losses", losses)
    return taken


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Gets an entry for every time that all rows are read from disk."""
    started: list[int] = []
    original = FileStore.parts

    def parts(self, n):
        started.append(1)
        return original(self, n)

    monkeypatch.setattr(FileStore, "parts", parts)
    return started


def judge_by(losses, monkeypatch) -> None:
    """The held-out losses that are measured from now on, in their order, then others."""
    coming = iter(losses)
    monkeypatch.setattr(HeldOut, "mean_loss", lambda self: next(coming, 5.0))


MIDDLE = [2.0, 1.0, 3.0] * len(TARGETS)
"""The second of the first three lambdas is the best for every target."""


@pytest.mark.parametrize(
    ("effort", "allocation"),
    [("fast", None), ("published", ModalityAllocation()), ("best", ModalityAllocation())],
)
def test_passes_do_not_grow_with_lambdas_and_targets(gradients, monkeypatch, effort, allocation):
    """Gradients are taken as often as for one lambda and one target."""
    judge_by(MIDDLE, monkeypatch)

    def run(lambda_, targets, first_order=False):
        gradients.clear()
        options = {"effort": effort, "first_order": first_order, "block_size": BLOCK, "rows": 5}
        method = chita(lambda_=lambda_, keep_in="passes", **options).with_allocation(allocation)
        method.run(context_of(targets=targets, memory_budget=BUDGET))
        return len(gradients)

    one = run(0.1, TARGETS[:1])
    assert one >= 3 * 5  # a pass for every group of columns
    assert run(0.1, TARGETS) == run("auto", TARGETS) == one
    assert run(0.1, TARGETS, 1e-9) == run(0.1, TARGETS[:1], 1e-9)


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
def test_passes_for_a_lambda_far_from_the_guess_are_two(gradients, monkeypatch, losses):
    """What was not solved ahead is asked for together, too."""
    options = {"block_size": BLOCK, "keep_in": "passes", "rows": 5}
    chita(lambda_=0.1, **options).run(context_of(memory_budget=BUDGET))
    once = len(gradients)
    gradients.clear()
    judge_by([*losses, *(2.0**-i for i in range(1, 5))], monkeypatch)

    [masks] = chita(**options).run(context_of(memory_budget=BUDGET))

    assert len(masks.manifest.parameters["lambda_curve"]) == 3 + 4 + 1 + 2
    assert len(gradients) == 2 * once


def test_passes_where_memory_holds_no_solutions_grow_and_change_nothing(gradients, monkeypatch):
    def run():
        judge_by(MIDDLE, monkeypatch)
        gradients.clear()
        context = context_of(targets=TARGETS, memory_budget=BUDGET)
        found = chita(block_size=BLOCK, keep_in="passes").run(context)
        return len(gradients), [pruned_weights(context, masks) for masks in found]

    taken, expected = run()
    monkeypatch.setattr(Pruner, "room", lambda self, groups: 2)
    more, found = run()

    assert more > taken
    for one, other in zip(expected, found, strict=True):
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_passes_over_rows_on_disk_are_shared_by_targets(reads, monkeypatch, tmp_path):
    """One for all targets of a given lambda; with auto one for each step of the search."""
    judge_by(MIDDLE, monkeypatch)

    def run(lambda_, targets):
        reads.clear()
        context = context_of(targets=targets, memory_budget=20_000, workplace=tmp_path)
        chita(lambda_=lambda_, block_size=BLOCK, keep_in="disk").run(context)
        return len(reads)

    assert run(0.1, TARGETS) == 1
    assert run("auto", TARGETS) == 2  # three lambdas, and half a decade to both sides of one


def test_choices_solved_ahead_are_those_of_a_search_step_by_step():
    def loss(ridge):
        return abs(ridge - 3e-4)

    def choices(ahead):
        asked = []

        def solve(jobs):
            asked.append(len(jobs))
            return [ridge for _, ridge in jobs]

        grids = [Grid(1.0), Grid(1e-3)]
        return choose_lambdas(solve, loss, grids, ahead=ahead), asked

    (stepwise, many), (at_once, few) = choices(0), choices(100)
    assert stepwise == at_once
    assert [count for count in few if count] == [26]
    assert len([count for count in many if count]) > 3


def test_syncs_of_a_step_do_not_grow_with_the_blocks(monkeypatch):
    """The published solver waits for the device once for a batch of blocks, not for each."""
    waits = []
    for name in ("__bool__", "__float__", "item", "tolist"):
        original = getattr(torch.Tensor, name)

        def counted(self, original=original):
            waits.append(1)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def count(blocks):
        waits.clear()
        bounds = tuple(range(0, 100 * blocks + 1, 100))
        p = bounds[-1]
        draw = torch.Generator().manual_seed(0)
        rows = MemoryRows(torch.randn(10, p, generator=draw), bounds)
        weights = torch.randn(p, generator=draw)
        solve_published(Problem(weights, rows, 0.01, p // 3, 0.25, bounds))
        return len(waits)

    assert count(64) <= count(8) + 10  # a search may be a step longer
