"""lambda="auto": the choice, its warnings, and what it may look at."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from chita_runs import context_of
from toy_loss import LosingAdapter, spoilt

from vlp_plugins.methods.chita.lambdas import GRID, Grid, choose_lambdas
from vlp_plugins.methods.chita.method import chita
from vlp_plugins.runtime.errors import NonFiniteError


def chosen(loss, grid=GRID):
    return choose_lambdas(lambda jobs: [ridge for _, ridge in jobs], loss, [grid])[0]


def bowl(best):
    return lambda ridge: 1 + math.log10(ridge / best) ** 2 / 100


def test_the_lowest_loss_wins_and_is_looked_for_between_the_decades():
    choice = chosen(bowl(0.3))

    assert choice.lambda_ == pytest.approx(10**-0.5)
    assert choice.found == choice.lambda_
    assert choice.loss == min(loss for _, loss in choice.curve)
    assert [ridge for ridge, _ in choice.curve] == sorted(ridge for ridge, _ in choice.curve)
    assert len(choice.curve) == len(GRID.steps) + 2
    assert choice.warnings == ()


def test_of_equal_losses_the_largest_lambda_wins():
    assert chosen(lambda ridge: 1.0 if ridge < 50 else 2.0).lambda_ == pytest.approx(10**1.5)


def test_losses_that_are_not_finite_are_never_chosen():
    choice = chosen(lambda ridge: float("nan") if ridge < 0.05 else bowl(1e-4)(ridge))

    assert choice.lambda_ == pytest.approx(0.1)
    assert "edge of the collapse" in choice.warnings[0]


def test_the_edge_of_the_collapse_is_told():
    choice = chosen(lambda ridge: 9.0 if ridge < 0.05 else bowl(1e-4)(ridge))

    assert len(choice.warnings) == 1
    assert "at 0.0316 the held-out loss is 9" in choice.warnings[0]


def test_ends_of_the_grid_are_told_and_the_large_one_is_moved():
    assert chosen(bowl(1e-9)).lambda_ == pytest.approx(1e-9)
    assert "smallest that was tried" in chosen(bowl(1e-40)).warnings[0]
    assert chosen(bowl(1e5)).lambda_ == pytest.approx(1e5)
    assert chosen(bowl(1e5)).warnings == ()
    assert "largest that was tried" in chosen(bowl(1e12)).warnings[0]


def test_near_a_known_lambda_few_are_tried():
    tried = []

    def loss(ridge):
        tried.append(ridge)
        return bowl(30)(ridge)

    choice = chosen(loss, Grid(1.0))

    assert choice.lambda_ == pytest.approx(10**1.5)
    assert len(tried) == 6  # three, one more beyond, and half a decade to both sides
    assert chosen(bowl(1e-3), Grid(1.0)).lambda_ == pytest.approx(1e-3)


def test_without_any_finite_loss_there_is_no_choice():
    with pytest.raises(NonFiniteError, match="for every lambda"):
        chosen(lambda ridge: math.inf)


def test_the_run_takes_the_minimum_of_its_curve(caplog):
    caplog.set_level(logging.INFO, "vlp_plugins.methods")
    masks = chita(lambda_="auto", effort="published").run(context_of())[0]

    parameters = masks.manifest.parameters
    curve = dict(parameters["lambda_curve"])
    assert parameters["held_out_loss"] == min(curve.values()) == curve[parameters["lambda"]]
    assert parameters["held_out_batches"] == 1
    assert "<- chosen" in caplog.text
    same = chita(lambda_=parameters["lambda"], rows=5, effort="published").run(context_of())[0]
    assert same == masks


def test_the_held_out_loss_is_that_of_the_pruned_model():
    context = context_of()
    masks = chita(lambda_="auto", effort="published").run(context)[0]

    masks.apply(context.model, context.adapter)
    context.model.eval()
    with torch.no_grad():
        terms = context.adapter.losses(context.model, context.batches[-1])
    assert float(sum(terms.values())) == pytest.approx(
        masks.manifest.parameters["held_out_loss"], rel=1e-6
    )


def test_held_out_batches_make_no_rows_and_no_others_are_looked_at(monkeypatch):
    seen = {"gradient": [], "loss": []}
    context = context_of(limit=5, targets=[0.5, 0.75])
    numbers = {float(batch["pixel_values"].sum()): n for n, batch in enumerate(context.batches)}
    original = LosingAdapter.losses

    def losses(self, model, batch, **options):
        kind = "gradient" if torch.is_grad_enabled() else "loss"
        seen[kind].append(numbers[float(batch["pixel_values"].sum())])
        return original(self, model, batch, **options)

    monkeypatch.setattr(LosingAdapter, "losses", losses)
    chita(lambda_="auto", effort="published", held_out=2).run(context)

    assert seen["gradient"] == [0, 1, 2]  # once, for both targets and every lambda
    assert set(seen["loss"]) == {3, 4}


def test_the_data_is_chosen_by_alone():
    """Batches beyond the limit, test data say, change nothing."""
    context = context_of(limit=4)
    expected = chita(lambda_="auto", effort="published").run(context)

    context.batches[4:] = [spoilt(batch) for batch in context.batches[4:]]

    assert chita(lambda_="auto", effort="published").run(context) == expected


def test_a_held_out_batch_that_is_not_finite_is_named_or_left_out():
    batches = context_of().batches
    batches[5] = spoilt(batches[5])

    with pytest.raises(NonFiniteError, match="held-out batch 5"):
        chita(lambda_="auto", effort="published", held_out=2).run(context_of(batches=batches))
    masks = chita(lambda_="auto", effort="published", held_out=2).run(
        context_of(batches=batches, skip_nonfinite=True)
    )[0]
    assert math.isfinite(masks.manifest.parameters["held_out_loss"])
