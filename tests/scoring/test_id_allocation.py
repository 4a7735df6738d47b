"""Budgets per modality from intrinsic dimensions."""

import pytest
from factor_towers import FACTORS, removed, scored, towers, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import SparsityError, StatisticsError, UnsupportedError
from vlp_plugins.scoring.allocation import IdAllocation, allocation_by_name
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.lamp import Lamp
from vlp_plugins.scoring.magnitude import Magnitude

SIZES = {"vision": 120 + 48, "text": 36 + 128}
MEANS = {
    "vision": (120 * 24.0 + 48 * 1.7) / 168,
    "text": (36 * 5.5 + 128 * 0.3) / 164,
}


def by_modality(counts):
    found = dict.fromkeys(SIZES, 0)
    for name, count in counts.items():
        found[name.split(".")[0]] += count
    return found


def allocation(**changed):
    return IdAllocation(Factors({**FACTORS, **changed}))


@given(
    sparsity=st.floats(0, 0.999),
    dimensions=st.lists(st.floats(0.5, 200), min_size=4, max_size=4),
    lamp=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_the_total_is_exact_and_densities_are_in_proportion(sparsity, dimensions, lamp):
    made = IdAllocation(Factors(dict(zip(FACTORS, dimensions, strict=True))))
    problem = scored(towers(), Lamp() if lamp else Magnitude())

    gone = by_modality(removed(problem, made.select(problem, [sparsity])[0]))

    assert sum(gone.values()) == int(sparsity * sum(SIZES.values()))
    means = {
        modality: sum(
            problem.weights[name].numel * made.factors[name]
            for name in FACTORS
            if name.startswith(modality)
        )
        for modality in SIZES
    }
    density = {m: (SIZES[m] - gone[m]) / SIZES[m] for m in SIZES}
    if all(0 < d < 1 for d in density.values()):
        expected = (means["vision"] / SIZES["vision"]) / (means["text"] / SIZES["text"])
        kept = {m: SIZES[m] - gone[m] for m in SIZES}
        low = (kept["vision"] - 1) * SIZES["text"] / ((kept["text"] + 1) * SIZES["vision"])
        high = (
            (kept["vision"] + 1) * SIZES["text"] / (max(kept["text"] - 1, 1e-9) * SIZES["vision"])
        )
        assert low <= expected <= high


def test_a_modality_that_would_keep_more_than_it_has_leaves_the_rest_to_others():
    kept = allocation().kept(weights_of(towers()), 200)
    assert MEANS["vision"] / MEANS["text"] > 5
    assert kept == {"vision": 168, "text": 32}


def test_more_dimensions_mean_more_weights():
    weights = weights_of(towers())
    last = -1
    for dimension in (0.1, 1.0, 3.0, 10.0, 100.0):
        found = allocation(**{"text.a": dimension, "text.b": dimension}).kept(weights, 80)
        assert sum(found.values()) == 80
        assert found["text"] > last
        last = found["text"]


def test_inside_a_modality_one_threshold_decides():
    problem = scored(towers(), Magnitude())
    selections = allocation().select(problem, [0.8])[0]
    for names in (("vision.a", "vision.b"), ("text.a", "text.b")):
        masks = {n: selections[n].mask(problem.scores(n)) for n in names}
        lowest_kept = min(float(problem.scores(n)[masks[n]].min()) for n in names if masks[n].any())
        highest_gone = max(float(problem.scores(n)[~masks[n]].max()) for n in names)
        assert lowest_kept >= highest_gone


def test_a_floor_is_kept_at_the_same_total():
    problem = scored(towers(), Magnitude())
    counts = removed(problem, allocation().select(problem, [0.8], floor=0.1)[0])
    assert sum(counts.values()) == int(0.8 * 332)
    for name, count in counts.items():
        size = problem.weights[name].numel
        assert size - count >= 0.1 * size


def test_a_floor_that_is_too_high_is_refused():
    problem = scored(towers(), Magnitude())
    with pytest.raises(SparsityError, match=r"67 of 332 elements .* keeps at least 98"):
        allocation().select(problem, [0.8], floor=0.29)


def test_budgets_by_hand_contradict_it():
    problem = scored(towers(), Magnitude())
    with pytest.raises(SparsityError, match="id allocation takes one sparsity"):
        allocation().select(problem, [{"vision": 0.5, "text": 0.5}])


def test_by_name_it_knows_no_dimensions_yet():
    made = allocation_by_name("id")
    assert made == IdAllocation()
    with pytest.raises(UnsupportedError, match="give id_profile"):
        made.select(scored(towers(), Magnitude()), [0.5])


def test_what_it_records_tells_one_profile_from_another():
    assert IdAllocation().record() == {"allocation": "id"}
    one, other = allocation().record(), allocation(**{"vision.a": 7.0}).record()
    assert one["id_factors"] == allocation().factors.fingerprint != other["id_factors"]


def test_a_weight_without_a_dimension_is_named():
    weights = weights_of(towers())
    more = WeightMap({**weights, "vision.c": weights["vision.a"]}, "towers")
    with pytest.raises(StatisticsError, match=r"no factor for weight 'vision\.c'"):
        allocation().kept(more, 10)
