"""Factors of importance: what they multiply, what they leave alone, what they are recorded as."""

import pytest
import torch
from factor_towers import FACTORS, factors, make_masks, removed, scored, towers, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Cost, Procedure
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.runtime.errors import SparsityError, StatisticsError, UnsupportedError
from vlp_plugins.scoring.allocation import (
    GlobalAllocation,
    LayerAllocation,
    ModalityAllocation,
    Pattern,
    RowAllocation,
)
from vlp_plugins.scoring.factors import Factors, Scaled
from vlp_plugins.scoring.lamp import Lamp, lamp
from vlp_plugins.scoring.magnitude import LayerL2, Magnitude

OMP = Composition("omp", Magnitude())


def naive_counts(scores, remove):
    """How many of each tensor are among the smallest of all, equal ones by position."""
    ordered = torch.cat([s.flatten() for s in scores.values()]).sort(stable=True).indices[:remove]
    ends = torch.tensor([s.numel() for s in scores.values()]).cumsum(0)
    places = torch.searchsorted(ends, ordered, right=True)
    return dict(zip(scores, torch.bincount(places, minlength=len(scores)).tolist(), strict=True))


@given(
    sparsity=st.floats(0, 0.999), coarse=st.sampled_from([0.0, 0.25, 1.0]), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_scores_times_factors_and_rankings_those_of_the_scores(
    sparsity, coarse, seed
):
    tensors = towers(seed, coarse)
    problem = scored(tensors, Scaled(Magnitude(), factors()))

    selections = GlobalAllocation().select(problem, [sparsity])[0]

    scaled = {name: w.abs() * FACTORS[name] for name, w in tensors.items()}
    total = sum(w.numel() for w in tensors.values())
    assert removed(problem, selections) == naive_counts(scaled, int(sparsity * total))
    for name, weight in tensors.items():
        mask = selections[name].mask(weight.abs())
        kept = weight.abs().flatten().sort(stable=True).indices[selections[name].remove :]
        assert sorted(kept.tolist()) == torch.nonzero(mask.flatten())[:, 0].tolist()


def test_scores_that_only_rounding_makes_equal_keep_their_order():
    factor = 0.6
    first = torch.tensor(1.8)
    while True:  # the next neighbours in float32 whose products with the factor are one number
        second = torch.nextafter(first, torch.tensor(2.0))
        if first * factor == second * factor:
            break
        first = second
    tensors = {"vision.a": torch.stack([second, first]).view(1, 2), "text.a": torch.ones(1, 1)}
    problem = scored(tensors, Scaled(Magnitude(), Factors({"vision.a": factor, "text.a": 1.0})))

    cut = problem.cuts([2])[0]["vision.a"]  # after the 1 of the other tensor

    assert cut.mask(tensors["vision.a"].abs()).tolist() == [[True, False]]


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_lamp_needs_no_sort_with_factors_either(scale):
    tensors = towers(3, scale)
    total = sum(w.numel() for w in tensors.values())
    problem = scored(tensors, Scaled(Lamp(), factors()))

    for removal in (0, 1, total // 3, int(0.9 * total), total):
        counts = removed(problem, problem.cuts([removal])[0])
        slow = naive_counts({n: lamp(w).double() * FACTORS[n] for n, w in tensors.items()}, removal)
        assert sum(counts.values()) == removal
        # float32 scores merge neighbours that float64 tells apart: counts may differ by those.
        assert all(abs(counts[name] - slow[name]) <= 2 for name in tensors)


@pytest.mark.parametrize("coarse", [0.0, 0.5])
def test_the_published_variant_is_the_score_times_the_dimension_under_one_threshold(coarse):
    tensors = towers(1, coarse)
    weights = weights_of(tensors)
    method = OMP.with_factors(FACTORS)

    masks = make_masks(weights, method, [0.7], published=True)[0]

    products = {name: w.abs() * FACTORS[name] for name, w in tensors.items()}
    together = torch.cat([p.flatten() for p in products.values()])
    threshold = together.kthvalue(int(0.7 * together.numel())).values
    assert all(torch.equal(masks[name], products[name] > threshold) for name in tensors)


def test_a_common_unit_changes_no_mask():
    weights = weights_of(towers(2))
    made = [
        make_masks(weights, OMP.with_factors({n: f * unit for n, f in FACTORS.items()}), [0.8])[0]
        for unit in (1.0, 1024.0, 2**-20)
    ]
    assert made[0] == made[1] == made[2]


def test_equal_factors_change_nothing_and_others_do():
    weights = weights_of(towers(4))
    for score in (Magnitude(), Lamp(), LayerL2()):
        for allocation in (
            GlobalAllocation(),
            ModalityAllocation(),
            LayerAllocation(),
            RowAllocation(),
        ):
            plain = Composition("plain", score, allocation)
            masks = make_masks(weights, plain, [0.3, 0.75])
            equal = make_masks(
                weights, plain.with_factors(dict.fromkeys(weights, 7.3)), [0.3, 0.75]
            )
            guided = make_masks(weights, plain.with_factors(FACTORS), [0.3, 0.75])
            assert masks == equal
            assert masks != guided
            assert [m.removed for m in guided] == [m.removed for m in masks]


def test_multiflow_reads_magnitude_times_factor_for_its_budgets_alone():
    weights = weights_of(towers(5))
    plain = Composition("m", LayerL2(), ModalityAllocation(), allocation_score=Magnitude())
    counts = make_masks(weights, plain.with_factors(FACTORS), [0.75])[0].counts()

    for modality, names in (("vision", ["vision.a", "vision.b"]), ("text", ["text.a", "text.b"])):
        scaled = {n: weights[n].matrix.abs() * FACTORS[n] for n in names}
        size = sum(s.numel() for s in scaled.values())
        expected = naive_counts(scaled, int(0.75 * size))
        assert {n: counts.by_weight[n].removed for n in names} == expected
        assert counts.by_modality[modality].removed == int(0.75 * size)


@pytest.mark.parametrize("allocation", [LayerAllocation(), RowAllocation()])
def test_where_no_score_is_read_densities_are_in_proportion_to_the_factors(allocation):
    weights = weights_of(towers(6))
    method = Composition("wanda", Magnitude(), allocation)
    plain = make_masks(weights, method, [0.9])[0]
    guided = make_masks(weights, method.with_factors(FACTORS), [0.9])[0]

    assert guided.removed == plain.removed
    kept = {name: int(guided[name].sum()) for name in weights}
    before = {name: int(plain[name].sum()) for name in weights}
    level = sum(kept.values()) / sum(before[name] * FACTORS[name] for name in weights)
    for name in weights:
        assert kept[name] == pytest.approx(before[name] * FACTORS[name] * level, abs=1)


def test_rows_of_a_tensor_lose_equally_many_but_for_one():
    weights = weights_of(towers(7))
    method = Composition("wanda", Magnitude(), RowAllocation()).with_factors(FACTORS)
    masks = make_masks(weights, method, [0.75])[0]
    for name in weights:
        lost = (~masks[name]).sum(1)
        assert int(lost.max() - lost.min()) <= 1


def test_budgets_per_modality_hold_under_factors():
    weights = weights_of(towers(8))
    method = Composition("wanda", Magnitude(), RowAllocation())
    target = {"vision": 0.5, "text": 0.75}
    plain = make_masks(weights, method, [target])[0].counts()
    guided = make_masks(weights, method.with_factors(FACTORS), [target])[0].counts()
    assert guided.by_modality == plain.by_modality
    assert guided.by_weight != plain.by_weight


@pytest.mark.parametrize("allocation", [GlobalAllocation(), LayerAllocation(), RowAllocation()])
def test_a_floor_holds_under_factors(allocation):
    problem = weights_of(towers(9))
    method = Composition("m", Magnitude(), allocation).with_factors(FACTORS)
    masks = make_masks(problem, method, [0.8], floor=0.1)[0]
    assert all(int(masks[name].sum()) >= 0.1 * weight.numel for name, weight in problem.items())
    with pytest.raises(SparsityError, match="floor of 0.5"):
        make_masks(problem, method, [0.8], floor=0.5)


def test_a_pattern_takes_no_factors():
    with pytest.raises(UnsupportedError, match="keep=2,of=4 .* give another allocation"):
        Composition("m", Magnitude(), Pattern(2, 4)).with_factors(FACTORS)
    with pytest.raises(UnsupportedError, match="give another allocation"):
        OMP.with_factors(FACTORS).with_allocation(Pattern(2, 4))


def test_an_allocation_that_comes_later_gets_the_factors_too():
    weights = weights_of(towers(10))
    first = Composition("m", Magnitude(), RowAllocation()).with_factors(FACTORS)
    later = Composition("m", Magnitude()).with_factors(FACTORS).with_allocation(RowAllocation())
    assert make_masks(weights, first, [0.6]) == make_masks(weights, later, [0.6])


def test_masks_say_which_factors_they_were_made_with():
    weights = weights_of(towers(11))
    source = {"owners": "all", "samples": 100}
    made = Factors(FACTORS, source)
    manifest = make_masks(weights, OMP.with_factors(made), [0.5])[0].manifest

    assert manifest.method == "id*omp"
    assert manifest.parameters["id_factors"] == made.fingerprint
    assert manifest.parameters["id_profile"] == source
    assert made.fingerprint == Factors(dict(reversed(FACTORS.items()))).fingerprint
    assert made.fingerprint != factors(**{"text.b": 0.31}).fingerprint


def test_a_second_set_of_factors_is_refused():
    with pytest.raises(UnsupportedError, match=r"'id\*omp' has factors already"):
        OMP.with_factors(FACTORS).with_factors(FACTORS)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_factors_are_positive_numbers(value):
    with pytest.raises(StatisticsError, match="'text.a' is .* above 0"):
        factors(**{"text.a": value})


def test_a_weight_without_a_factor_is_named():
    given = {name: value for name, value in FACTORS.items() if name != "text.b"}
    with pytest.raises(StatisticsError, match=r"no factor for weight 'text.b' \(did you mean"):
        make_masks(weights_of(towers()), OMP.with_factors(given), [0.5])


def test_a_procedure_that_knows_nothing_of_factors_says_so():
    class Plain(Procedure):
        name = "plain"

        def run(self, context):
            return []

        def cost(self, context):
            return Cost()

    with pytest.raises(UnsupportedError, match="'plain' takes no factors"):
        Plain().with_factors(FACTORS)


def test_an_iterative_method_keeps_its_name_behind_the_star():
    assert make_method(registry(), "itersnip").with_factors(FACTORS).name == "id*itersnip"
