"""What every registered scorer has to keep, ours and any outsider's that is installed."""

import pytest
import torch
from torch import nn

from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import Weight
from vlp_plugins.scoring.score import Evidence, MagnitudeRanked

SCORERS = registry().names("scorers")


def weight(dtype=torch.float32):
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)


def evidence(scorer, name="vision.0.mlp.fc1"):
    """Positive statistics of the sizes that the scorer asks for."""
    generator = torch.Generator().manual_seed(1)
    owned = Weight(name, "vision", 0, nn.Parameter(weight()), (), ())
    statistics = {
        need.name: torch.rand(need.size(owned), generator=generator, dtype=torch.float64) + 0.1
        for need in scorer.needs
    }
    return Evidence(name, 7, statistics)


@pytest.fixture(params=SCORERS)
def scorer(request):
    return make_method(registry(), request.param).score


def test_it_is_registered_under_its_own_name(scorer):
    assert type(scorer).name in SCORERS
    assert type(scorer).__doc__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_finite_float32_of_the_shape_of_the_weight(scorer, dtype):
    given = weight(dtype)
    before = given.clone()

    scores = scorer.score(given, evidence(scorer))

    assert scores.dtype == torch.float32
    assert scores.shape == given.shape
    assert torch.isfinite(scores).all()
    assert torch.equal(given, before)
    assert given.dtype == dtype


def test_the_same_weight_and_evidence_give_the_same_scores(scorer):
    state = torch.get_rng_state()
    one, other = (scorer.score(weight(), evidence(scorer)) for _ in range(2))

    assert torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_zero_weight_is_never_more_important_than_another(scorer):
    given = weight()
    given[2, 3] = 0
    scores = scorer.score(given, evidence(scorer))

    if type(scorer).name != "random":
        assert scores[2, 3] == scores.min()
    assert torch.isfinite(scorer.score(torch.zeros(6, 10), evidence(scorer))).all()


def test_scores_ask_for_nothing_but_what_they_declare(scorer):
    given = evidence(scorer)
    for name in given.statistics:
        rest = {key: value for key, value in given.statistics.items() if key != name}
        with pytest.raises(KeyError):
            scorer.score(weight(), Evidence(given.name, given.seed, rest))


def test_an_elementwise_score_is_that_of_the_element_alone(scorer):
    if not scorer.elementwise:
        return
    given = evidence(scorer)
    scores = scorer.score(weight(), given)

    some = scorer.score(weight().flatten()[None, ::7], given.every(7))

    assert torch.equal(some[0], scores.flatten()[::7])


def test_a_score_that_is_ranked_by_magnitude_has_the_order_of_magnitude(scorer):
    if not isinstance(scorer, MagnitudeRanked):
        return
    given = weight()
    order = scorer.score(given, evidence(scorer)).flatten().argsort()

    assert torch.equal(order, given.abs().flatten().argsort())
