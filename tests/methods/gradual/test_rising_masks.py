"""Rising masks: exact counts whenever they are chosen, ties by position, what comes back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from toy_loops import weights_of
from toy_loss import losing_toy

from vlp_plugins.methods.gradual.rising_masks import Rise, RisingMasks, Timetable
from vlp_plugins.methods.gradual.scores import CurrentMagnitude, Platon, Taylor
from vlp_plugins.runtime.errors import NonFiniteError, SparsityError, StatisticsError
from vlp_plugins.scoring.allocation import (
    GlobalAllocation,
    LayerAllocation,
    ModalityAllocation,
    Pattern,
    RowAllocation,
)
from vlp_plugins.scoring.factors import Factors

SCORES = [CurrentMagnitude(), Taylor(), Platon()]


def rising(score=None, target=0.75, times=None, **options):
    weights = weights_of(losing_toy())
    rise = Rise(score or Platon(), target, times or Timetable(20, 2, 4, 3), **options)
    return RisingMasks(weights, rise)


def gradients_for(weights, step):
    rng = torch.Generator().manual_seed(step)
    return {name: torch.randn(w.shape, generator=rng) for name, w in weights.items()}


def run(masks, steps=20, *, gradients=gradients_for):
    """What was kept after every choice, by step; removed weights train on in between."""
    found = {}
    rng = torch.Generator().manual_seed(100)
    for step in range(steps):
        masks.observe(gradients(masks.weights, step))
        for weight in masks.weights.values():
            with torch.no_grad():
                weight.parameter.add_(0.1 * torch.randn(weight.shape, generator=rng))
        if masks.advance():
            found[masks.step] = dict(masks.keep)
        if masks.keep and (masks.step in found or masks.held):
            for name, weight in masks.weights.items():
                with torch.no_grad():
                    weight.parameter[~masks.keep[name]] = 0
    return found


def removed(keep):
    return sum(int((~mask).sum()) for mask in keep.values())


def scopes_of(weights, allocation):
    if isinstance(allocation, GlobalAllocation):
        return [("all", weights.numel)]
    if isinstance(allocation, ModalityAllocation):
        return [(m, sum(w.numel for w in g)) for m, g in weights.by_modality().items()]
    if isinstance(allocation, LayerAllocation):
        return [(w.modality, w.numel) for w in weights.values()]
    return [(w.modality, w.matrix.shape[1]) for w in weights.values() for _ in w.matrix]


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
@pytest.mark.parametrize("revive", [True, False])
def test_every_choice_removes_exactly_the_count_of_its_level(score, revive):
    masks = rising(score, revive=revive)
    times = masks.rise.timetable

    found = run(masks)

    assert list(found) == [3, 6, 9, 12, 15, 16]
    for step, keep in found.items():
        assert removed(keep) == int(times.level(0.75, step) * masks.weights.numel)
    assert removed(masks.keep) == int(0.75 * masks.weights.numel)
    assert masks.sparsity == pytest.approx(removed(masks.keep) / masks.weights.numel)


@pytest.mark.parametrize(
    "allocation", [ModalityAllocation(), LayerAllocation(), RowAllocation()], ids=lambda a: a.name
)
def test_budgets_are_met_exactly_in_every_scope(allocation):
    target = {"vision": 0.4, "text": 0.8}
    masks = rising(target=target, allocation=allocation)

    found = run(masks)

    for step, keep in found.items():
        level = masks.rise.timetable.level(target, step)
        expected = sum(int(level[m] * n) for m, n in scopes_of(masks.weights, allocation))
        assert removed(keep) == expected


def test_the_masks_stay_as_they_are_in_the_final_warm_up_and_beyond():
    masks = rising()
    run(masks, 16)
    last = dict(masks.keep)

    assert not run(masks, 8)
    assert all(torch.equal(masks.keep[name], last[name]) for name in last)
    assert masks.finished
    assert masks.held


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
def test_weights_come_back_only_if_they_may(score):
    def revived(found):
        return sum(
            int((late[name] & ~early[name]).sum())
            for early, late in pairwise(found.values())
            for name in early
        )

    assert revived(run(rising(score))) > 0
    assert revived(run(rising(score, revive=False))) == 0


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
def test_equal_scores_go_by_position(score):
    masks = rising(score, times=Timetable(3, 0, 0, 3))
    with torch.no_grad():
        for weight in masks.weights.values():
            weight.parameter.fill_(1.0)
    ones = {name: torch.ones(w.shape) for name, w in masks.weights.items()}

    for _ in range(3):
        masks.observe(ones)
        masks.advance()

    flat = torch.cat([mask.flatten() for mask in masks.keep.values()])
    count = int(0.75 * masks.weights.numel)
    assert not flat[:count].any()
    assert flat[count:].all()


def test_platon_removes_what_a_loop_over_the_numbers_says():
    masks = rising(Platon(0.7, 0.9), times=Timetable(6, 0, 0, 2), revive=False, target=0.6)
    start = torch.cat([w.parameter.detach().flatten() for w in masks.weights.values()]).clone()
    means = torch.zeros_like(start, dtype=torch.float64)
    spreads = torch.zeros_like(means)

    for window in range(3):
        samples = []
        for step in (2 * window, 2 * window + 1):
            gradients = gradients_for(masks.weights, step)
            flat = torch.cat([gradients[name].flatten() for name in masks.weights])
            weights = torch.cat([w.parameter.detach().flatten() for w in masks.weights.values()])
            samples.append((weights.double() * flat.double()).abs())
            masks.observe(gradients)
            masks.advance()
        mean = (samples[0] + samples[1]) / 2
        means = 0.7 * means + 0.3 * mean
        spreads = 0.9 * spreads + 0.1 * (mean - means).abs()
        scores = means * spreads
        if window:
            scores[~kept] = -1  # noqa: F821 - of the window before
        count = int(
            (0.6 if window == 2 else masks.rise.timetable.level(0.6, 2 * window + 2)) * len(start)
        )
        kept = torch.ones_like(start, dtype=torch.bool)
        kept[scores.argsort(stable=True)[:count]] = False
        found = torch.cat([masks.keep[name].flatten() for name in masks.weights])
        assert torch.equal(found, kept)
        with torch.no_grad():
            for name, weight in masks.weights.items():
                weight.parameter[~masks.keep[name]] = 0


def test_factors_move_sparsity_between_layers_and_change_no_ranking_within_one():
    plain = rising(Taylor(), times=Timetable(1), target=0.5)
    names = list(plain.weights)
    factors = Factors({name: 8.0 if index % 2 else 1.0 for index, name in enumerate(names)})
    guided = rising(Taylor(), times=Timetable(1), target=0.5, factors=factors)

    run(plain, 1)
    run(guided, 1)

    assert removed(plain.keep) == removed(guided.keep)
    assert guided.rise.name == "id*taylor"
    for index, name in enumerate(names):
        more, less = (guided, plain) if index % 2 else (plain, guided)
        assert bool((more.keep[name] | ~less.keep[name]).all())  # one is part of the other
    assert any(not torch.equal(plain.keep[name], guided.keep[name]) for name in names)
    assert guided.rise.record()["id_factors"] == factors.fingerprint


def test_a_missing_factor_is_named_at_once():
    with pytest.raises(StatisticsError, match=r"'vision\.patch'"):
        rising(factors=Factors({"text.q": 1.0}))


def test_a_floor_is_kept_at_every_choice():
    found = run(rising(target=0.9, floor=0.08))

    for keep in found.values():
        assert all(int(mask.sum()) >= 0.08 * mask.numel() for mask in keep.values())


def test_a_pattern_is_cut_at_once_or_not_at_all():
    with pytest.raises(SparsityError, match="schedule='constant'"):
        rising(allocation=Pattern(keep=1, of=2), target=0.5)

    masks = rising(
        Taylor(), 0.5, Timetable(6, 0, 0, 3, "constant"), allocation=Pattern(keep=1, of=2)
    )
    run(masks, 6)
    for mask in masks.keep.values():
        assert bool((mask.reshape(-1, 2).sum(1) == 1).all())


def test_a_weight_without_gradients_is_unimportant_and_no_error():
    def without(weights, step):
        gradients = gradients_for(weights, step)
        del gradients["text.feed"]
        return gradients

    masks = rising(Taylor(), target=0.3)
    run(masks, gradients=without)

    assert not masks.keep["text.feed"].any()
    assert removed(masks.keep) == int(0.3 * masks.weights.numel)


def test_steps_without_samples_count_all_the_same():
    masks = rising(Taylor())
    for _ in range(20):
        masks.advance()  # as if all were skipped

    assert removed(masks.keep) == int(0.75 * masks.weights.numel)


def test_gradients_that_are_not_finite_are_an_error_that_names_the_weight():
    def spoilt(weights, step):
        return gradients_for(weights, step) | {"text.q": torch.full((6, 6), torch.nan)}

    with pytest.raises(NonFiniteError, match=r"'platon'.*'text\.q'"):
        run(rising(), gradients=spoilt)


def test_what_a_score_remembers_is_let_go_when_the_masks_are_the_last_ones():
    masks = rising()
    run(masks, 15)
    assert masks.state
    run(masks, 1)

    assert not masks.state
    assert not masks.sums
