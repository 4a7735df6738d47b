"""What CHITA says beforehand that it will need."""

from __future__ import annotations

import pytest
import torch
from chita_runs import BATCHES, context_of
from toy_loss import LosingAdapter, LosingToy

from vlp_plugins.methods.chita import cost as timing
from vlp_plugins.methods.chita.cost import sweeps_of
from vlp_plugins.methods.chita.method import chita, chita_plus_plus
from vlp_plugins.methods.method import Context
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, SparsityError


def test_gradients_are_those_that_the_run_takes(monkeypatch):
    gradients = []
    original = LosingAdapter.losses

    def losses(self, model, batch, **options):
        gradients.append(torch.is_grad_enabled())
        return original(self, model, batch, **options)

    monkeypatch.setattr(LosingAdapter, "losses", losses)
    for method in (
        chita(lambda_=0.1),
        chita(lambda_=0.1, rows=3),
        chita_plus_plus(lambda_=0.1, rounds=2),
    ):
        gradients.clear()
        context = context_of(targets=[0.5, 0.75])
        cost = method.cost(context)
        assert not gradients

        method.run(context)
        assert cost.gradient_batches == len(gradients)


def test_the_number_of_sweeps_is_not_underestimated():
    for effort in ("published", "fast", "best"):
        for options in ({}, {"block_size": None}, {"first_order": True}):
            method = chita(lambda_=0.1, effort=effort, **options)
            masks = method.run(context_of(targets=[0.9]))[0]

            assert masks.manifest.parameters["sweeps"] <= sweeps_of(method.settings)


def test_the_matrix_of_the_paper_is_named_beside_ours():
    context = context_of()
    p = context.weights.numel

    notes = "\n".join(chita(lambda_=0.1).cost(context).notes)

    assert f"{BATCHES} rows of {p:,} gradients in float32" in notes
    assert "with the 500 rows of the paper in float32 it would be" in notes


def test_auto_counts_its_forwards(monkeypatch):
    monkeypatch.setattr(timing, "_seconds", lambda problem, effort: 1.0)
    context = context_of(targets=[0.5, 0.75])

    given, auto = (chita(lambda_=value).cost(context) for value in (0.1, "auto"))

    assert auto.gradient_batches == 5 + -(-(7 * 2 + 1) // 3)
    assert auto.seconds > given.seconds
    assert "by the loss on 1 held-out batches" in "\n".join(auto.notes)


def test_the_number_of_batches_may_come_from_the_limit_alone():
    model = LosingToy()
    adapter = LosingAdapter()
    context = Context(model, adapter, WeightMap.of(model, adapter), (), [0.5], limit=4)

    assert chita(lambda_=0.1).cost(context).gradient_batches == 4
    with pytest.raises(DataError, match="nobody can say how many batches"):
        chita(lambda_=0.1).cost(context_of(batches=iter([])))


def test_more_rows_than_batches_are_refused_before_the_run():
    with pytest.raises(DataError, match=f"rows={BATCHES + 1} needs as many batches"):
        chita(lambda_=0.1, rows=BATCHES + 1).cost(context_of())
    with pytest.raises(DataError, match="holds 9 of the batches out"):
        chita(held_out=9).cost(context_of())
    assert chita(rows=2).cost(context_of(batches=iter([]))).gradient_batches


def test_a_floor_is_refused_before_the_run():
    for method in (chita(lambda_=0.1), chita_plus_plus(lambda_=0.1)):
        with pytest.raises(SparsityError, match=r"has no floor \(0.1 was asked"):
            method.cost(context_of(floor=0.1))
