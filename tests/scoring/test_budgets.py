"""Budgets of blocks: OWL, and the rule of ECoFLaP and TAMP."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import SparsityError, UnknownNameError, UnsupportedError
from vlp_plugins.scoring.allocation import RowAllocation, allocation_by_name
from vlp_plugins.scoring.budgets import Groups, published_budgets
from vlp_plugins.scoring.das import Das, das_importance
from vlp_plugins.scoring.ecoflap import Ecoflap
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.owl import Owl, outlier_fraction, owl_sparsities
from vlp_plugins.scoring.score import Evidence
from vlp_plugins.scoring.selection import Scored

SHAPES = {"q": (16, 16), "k": (4, 16), "up": (32, 16)}
TOWERS = {"vision": 2, "text": 3}


def problem(seed=0, published=False):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for modality, depth in TOWERS.items():
        for block in range(depth):
            for kind, shape in SHAPES.items():
                name = f"{modality}.{block}.{kind}"
                values = torch.randn(shape, generator=generator) ** (1 + 2 * (block % 2))
                parameter = torch.nn.Parameter(values)
                weights[name] = Weight(name, modality, block, parameter, (), (name,))
    evidence = {name: Evidence(name) for name in weights}
    return Scored(Magnitude(), weights, evidence, published)


def counts(scored, selections):
    found = {}
    for name, selection in selections.items():
        mask = selection.mask(scored.scores(name))
        assert int((~mask).sum()) == selection.remove
        found[name] = selection.remove
    return found


def measured(kind, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    names = problem().weights
    draw = torch.rand(len(names), 3, generator=generator).tolist()
    values = {n: d if kind is Das else d[0] for n, d in zip(names, draw, strict=True)}
    return kind(found=values, **options)


ALL = {"owl": Owl(), "das": measured(Das), "ecoflap": measured(Ecoflap)}


@pytest.mark.parametrize("name", ALL)
@given(sparsity=st.floats(0, 0.999), rows=st.booleans(), floor=st.sampled_from([0.0, 0.02]))
@settings(max_examples=40, deadline=None)
def test_counts_are_exact(name, sparsity, rows, floor):
    scored = problem()
    total = sum(weight.numel for weight in scored.weights.values())
    allocation = ALL[name].within(RowAllocation()) if rows else ALL[name]
    if (1 - sparsity) < 0.05:
        floor = 0.0

    found = counts(scored, allocation.select(scored, [sparsity], floor=floor)[0])

    assert sum(found.values()) == int(sparsity * total)
    for each, removed in found.items():
        assert scored.weights[each].numel - removed >= floor * scored.weights[each].numel


@pytest.mark.parametrize("name", ["owl", "ecoflap"])
def test_inside_a_block_every_tensor_loses_the_same_fraction(name):
    scored = problem()

    found = counts(scored, ALL[name].select(scored, [0.6])[0])

    blocks = {}
    for each, removed in found.items():
        share = removed / scored.weights[each].numel
        blocks.setdefault(each.rpartition(".")[0], []).append((share, scored.weights[each].numel))
    assert len({round(shares[0][0], 3) for shares in blocks.values()}) > 2
    for shares in blocks.values():
        first, most = shares[0][0], min(size for _, size in shares)
        assert all(abs(share - first) <= 1.01 / most for share, _ in shares)


@pytest.mark.parametrize("name", ALL)
def test_budgets_per_modality_are_those_of_each(name):
    scored = problem()
    budget = {"vision": 0.0, "text": 0.7}

    found = counts(scored, ALL[name].select(scored, [budget])[0])

    total = sum(w.numel for w in scored.weights.values() if w.modality == "text")
    assert sum(count for each, count in found.items() if each.startswith("text")) == int(
        0.7 * total
    )
    assert not any(count for each, count in found.items() if each.startswith("vision"))


def naive_owl(scored, M, lambda_, sparsity):
    blocks = {}
    for name, weight in scored.weights.items():
        blocks.setdefault((weight.modality, weight.depth), []).extend(
            scored.scores(name).flatten().tolist()
        )
    outliers = []
    for values in blocks.values():
        mean = sum(values) / len(values)
        outliers.append(sum(value > M * mean for value in values) / len(values))
    low, high = min(outliers), max(outliers)
    r = [(o - low) / (high - low) * 2 * lambda_ for o in outliers]
    return [sparsity - (each - sum(r) / len(r)) for each in r]


def test_owl_is_the_formula():
    scored = problem()
    allocation = Owl(M=3, lambda_=0.1)
    outliers = list(allocation.importances(scored).values())

    expected = naive_owl(scored, 3, 0.1, 0.6)

    assert owl_sparsities(outliers, 0.6, 0.1) == pytest.approx(expected)
    found = counts(scored, allocation.select(scored, [0.6])[0])
    sizes = {name: weight.numel for name, weight in scored.weights.items()}
    blocks = {}
    for name, removed in found.items():
        pair = blocks.setdefault(name.rpartition(".")[0], [0, 0])
        pair[0] += removed
        pair[1] += sizes[name]
    # Blocks are of one size here, so that the densities need no correction.
    assert [a / b for a, b in blocks.values()] == pytest.approx(expected, abs=2e-3)


def test_owl_with_equal_outliers_is_even_and_nothing_is_emptied():
    """Quirks owl-O2 and owl-O3."""
    assert owl_sparsities([0.3, 0.3], 0.7, 0.08) == [0.7, 0.7]
    scored = problem()

    found = counts(scored, Owl(lambda_=0.5).select(scored, [0.9])[0])

    kept = {}
    for name, removed in found.items():
        block = name.rpartition(".")[0]
        kept[block] = kept.get(block, 0) + scored.weights[name].numel - removed
    assert min(kept.values()) > 0
    assert sum(found.values()) == int(0.9 * sum(w.numel for w in scored.weights.values()))


def test_owl_of_low_sparsities_is_bounded_as_published():
    groups = Groups([0.0, 0.5, 1.0], [10, 10, 10], [0, 0, 0])

    assert Owl().sparsities(groups, 0.05) == pytest.approx([0.13, 0.05, 0.01])
    assert sum(Owl().kept(groups, 29, 0.05)) == 29


def test_outliers_are_above_the_multiple_of_the_mean_of_all():
    scores = {"a": torch.tensor([[1.0, 1.0, 20.0]]), "b": torch.tensor([[2.0, 2.0]])}

    assert outlier_fraction(scores, 3) == 1 / 5  # 15.6
    assert outlier_fraction(scores, 0.3) == 3 / 5


@given(
    sizes=st.lists(st.integers(5, 400), min_size=1, max_size=6),
    values=st.lists(st.floats(0, 10), min_size=6, max_size=6),
    sparsity=st.floats(0.05, 0.95),
    margin=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_the_rule_keeps_the_margin_and_the_total(sizes, values, sparsity, margin):
    groups = Groups(values[: len(sizes)], sizes, [0] * len(sizes))
    keep = sum(sizes) - int(sparsity * sum(sizes))

    found = Ecoflap(margin=margin).kept(groups, keep, sparsity)

    assert sum(found) == keep
    for stay, size in zip(found, sizes, strict=True):
        assert int(size * (1 - min(1, sparsity + margin))) <= stay <= size


def test_equal_importances_keep_equal_fractions_and_published_ones_equal_numbers():
    """Quirk budget-D1."""
    groups = Groups([1.0, 1.0], [100, 1000], [0, 0])

    assert Das().kept(groups, 550, 0.5) == [50, 500]
    ours, theirs = published_budgets([1.0, 1.0], [100, 1000], 0.5, 0.6)
    assert ours == pytest.approx(1 - (40 + 55) / 100)
    assert theirs == pytest.approx(1 - (400 + 55) / 1000)


def test_groups_without_any_importance_keep_equal_fractions():
    assert Das().kept(Groups([0.0, 0.0], [100, 1000], [0, 0]), 550, 0.5) == [50, 500]
    sparsities = published_budgets([0.0, 0.0], [100, 1000], 0.5, 0.6)
    kept = sum(n * (1 - s) for n, s in zip([100, 1000], sparsities, strict=True))
    assert kept == pytest.approx(550)


def test_what_was_dealt_out_too_much_is_added_once_more_as_published():
    """Quirk budget-D2."""
    sizes = [301, 299, 400]
    kept = [
        n * (1 - s)
        for n, s in zip(sizes, published_budgets([3, 2, 1], sizes, 0.5, 0.6), strict=True)
    ]

    assert sum(kept) > 500


def test_das_adds_up_what_is_known():
    assert das_importance([0.5, 0.25, 0.0]) == 0.5 + 0.75 + 1
    assert das_importance([0.5, None, None]) == 1.5
    assert math.isnan(das_importance([None, None, None]))
    scored = problem()
    found = dict(measured(Das).found)
    found["text.0.q"] = [None, None, None]

    values = Das(found=found).importances(scored)

    others = [value for group, value in values.items() if group != ("text.0.q", 0)]
    assert values["text.0.q", 0] == pytest.approx(sum(others) / len(others))


def test_names_bring_parameters():
    assert allocation_by_name("owl(M=3, lambda=0.1)") == Owl(M=3, lambda_=0.1)
    assert allocation_by_name("ecoflap(batches=2)").record() == {
        "allocation": "ecoflap",
        "even": "layer",
        "margin": 0.1,
        "eps": 0.001,
        "batches": 2,
    }
    assert Owl(even=RowAllocation()).record() != Owl().record()
    with pytest.raises(SparsityError, match="did you mean 'owl'"):
        allocation_by_name("owll")
    with pytest.raises(UnknownNameError, match="no parameter 'm'; it takes .*M, lambda"):
        allocation_by_name("owl(m=3)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Owl(M=0), "M=0; give a number above 0"),
        (lambda: Owl(lambda_=2), "lambda=2; give a number above 0, at most 0.5"),
        (lambda: Owl(even="row"), r"even='row'; give LayerAllocation\(\)"),
        (lambda: Das(margin=-1), "margin=-1; give a number from 0"),
        (lambda: Ecoflap(eps="small"), "eps='small'; give a number above 0"),
        (lambda: Ecoflap(batches=0), "batches=0; give a whole number from 1 on"),
        (lambda: Das().select(problem(), [0.5]), "'das' runs the model before it can allocate"),
        (lambda: Das(found={"a": [1]}).select(problem(), [0.5]), "without weight 'vision.0.q'"),
        (lambda: Owl(factors=Factors({})).with_factors(Factors({})), "has factors already"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(UnsupportedError, match=message):
        make()


@pytest.mark.parametrize("name", ALL)
def test_factors_multiply_the_importance_of_a_group(name):
    scored = problem()
    plain = counts(scored, ALL[name].select(scored, [0.6])[0])
    equal = ALL[name].with_factors(Factors(dict.fromkeys(scored.weights, 3.1)))
    assert counts(scored, equal.select(scored, [0.6])[0]) == plain

    factors = {n: 4.0 if n.startswith("text.1") else 1.0 for n in scored.weights}
    found = counts(scored, ALL[name].with_factors(Factors(factors)).select(scored, [0.6])[0])

    assert sum(found.values()) == sum(plain.values())
    gone = [sum(c for n, c in each.items() if n.startswith("text.1")) for each in (plain, found)]
    assert gone[1] < gone[0] or name == "owl"  # which may have given it the most already
    assert found != plain


def test_a_floor_that_keeps_too_much_is_refused():
    for allocation in ALL.values():
        with pytest.raises(SparsityError, match="lower the sparsity or the floor"):
            allocation.select(problem(), [0.9], floor=0.2)
        with pytest.raises(SparsityError, match="no floor"):
            allocation.select(problem(published=True), [0.5], floor=0.2)
