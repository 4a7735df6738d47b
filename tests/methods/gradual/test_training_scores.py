"""The scores that a training loop feeds, against loops over single numbers."""

from __future__ import annotations

import pytest
import torch

from vlp_plugins.methods.gradual.scores import (
    CurrentMagnitude,
    Platon,
    Taylor,
    training_score,
)
from vlp_plugins.runtime.errors import UnknownNameError, UnsupportedError
from vlp_plugins.scoring.score import Evidence
from vlp_plugins.scoring.snip import snip


def walks(steps, *, seed=0):
    """Weights and gradients of three elements at every step."""
    rng = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(1, 3, generator=rng), torch.randn(1, 3, generator=rng)) for _ in range(steps)
    ]


def folded(score, samples):
    state = {}
    for sample in samples:
        score.fold(state, sample.flatten())
    return score.score(torch.zeros(1, 3), Evidence("w", 0, state))


def test_platon_is_the_product_of_both_averages():
    walk = walks(7)
    found = folded(Platon(0.8, 0.6), [snip(w, g) for w, g in walk])

    for index in range(3):
        mean = spread = 0.0
        for weight, gradient in walk:
            now = abs(float(weight[0, index]) * float(gradient[0, index]))
            mean = 0.8 * mean + 0.2 * now
            spread = 0.6 * spread + 0.4 * abs(now - mean)
        assert float(found[0, index]) == pytest.approx(mean * spread, rel=1e-5)


def test_the_published_betas_are_the_default():
    assert Platon().parameters == {"beta1": 0.85, "beta2": 0.95}


def test_the_rule_lowers_a_steady_importance_and_raises_an_uncertain_one():
    steady = [torch.full((1, 3), 1.0)] * 60
    uncertain = [torch.full((1, 3), 2.0 * (step % 2)) for step in range(60)]

    assert bool((folded(Platon(), uncertain) > 2 * folded(Platon(), steady)).all())


def test_taylor_is_the_mean_of_the_last_window_alone():
    first, last = (snip(w, g) for w, g in walks(2))

    torch.testing.assert_close(folded(Taylor(), [first.clone(), last.clone()]), last)


def test_sensitivity_is_the_size_of_weight_times_gradient_in_float32():
    weight = torch.tensor([[-2.0, 0.5, 0.0]], dtype=torch.bfloat16)
    gradient = torch.tensor([[3.0, -4.0, 5.0]])

    found = snip(weight, gradient)

    assert found.dtype == torch.float32
    assert found.tolist() == [[6.0, 2.0, 0.0]]


def test_magnitude_reads_the_weights_of_the_moment():
    weight = torch.tensor([[-2.0, 0.5]])

    assert CurrentMagnitude().score(weight, Evidence("w")).tolist() == [[2.0, 0.5]]
    assert not CurrentMagnitude().reads_gradients


@pytest.mark.parametrize("score", [Taylor(), Platon()])
def test_every_nth_element_has_the_score_that_it_has_among_all(score):
    state = {}
    for weight, gradient in ((torch.randn(4, 6), torch.randn(4, 6)) for _ in range(3)):
        score.fold(state, snip(weight, gradient).flatten())
    evidence = Evidence("w", 0, state)
    whole = score.score(torch.zeros(4, 6), evidence)

    some = score.score(torch.zeros(1, 8), evidence.every(3))

    assert torch.equal(some.flatten(), whole.flatten()[::3])


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.5, -0.1)])
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(UnsupportedError, match="beta"):
        Platon(*betas)


def test_scores_go_by_name():
    assert training_score("platon") == Platon()
    assert isinstance(training_score("taylor"), Taylor)
    with pytest.raises(UnknownNameError, match="did you mean 'platon'"):
        training_score("plato")
