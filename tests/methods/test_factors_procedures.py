"""Factors of importance in methods that run the model as they go: CHITA, TAMT, iterations."""

import pytest
import torch
from chita_runs import context_of
from factor_towers import profile_of
from toy_loss import losing_toy

from vlp_plugins.methods.chita.method import chita, chita_plus_plus
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.iterative import Iterative, itersnip
from vlp_plugins.methods.tamt.method import Tamt
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.allocation import IdAllocation, LayerAllocation, Pattern
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.threshold import top


@pytest.fixture
def context():
    return context_of(targets=[0.5, 0.75])


@pytest.fixture
def factors(context):
    return profile_of(context.weights).factors(context.weights, "all")


def chita_with(**options):
    return chita(lambda_=0.1, block_size=20, **options)


def kept(masks):
    return {name: int(masks[name].sum()) for name in masks}


@pytest.mark.parametrize("effort", ["fast", "published", "best"])
def test_chita_fills_its_blocks_by_magnitude_times_factor(context, factors, effort):
    found = chita_with(effort=effort).with_factors(factors).run(context)

    for target, masks in zip(context.targets, found, strict=True):
        weighed = [
            w.matrix.flatten().abs() * factors.relative(n) for n, w in context.weights.items()
        ]
        sizes = [len(part) for part in weighed]
        keep = sum(sizes) - int(target * sum(sizes))
        expected = top(torch.cat(weighed), keep).split(sizes)
        assert kept(masks) == {
            name: int(part.sum()) for name, part in zip(context.weights, expected, strict=True)
        }
        assert masks.manifest.method == "id*chita"
        assert masks.manifest.parameters["id_factors"] == factors.fingerprint


METHODS = [
    chita_with(),
    chita_plus_plus(lambda_=0.1, block_size=20, rounds=2),
    itersnip(rounds=2),
    Iterative(Composition("magnitude", Magnitude()), rounds=3),
    Tamt(steps=3),
]
BY_LAYER = Tamt(steps=3, allocation=LayerAllocation())


@pytest.mark.parametrize(
    ("method", "published"),
    [(m, p) for m in METHODS for p in (False, True)] + [(BY_LAYER, False)],
    ids=lambda value: getattr(value, "name", value),
)
def test_equal_factors_change_nothing_and_others_do(factors, method, published):
    context = context_of(targets=[0.75], published=published)
    equal = dict.fromkeys(context.weights, 3.1)
    plain = method.run(context)
    guided = method.with_factors(factors).run(context)

    assert method.with_factors(equal).run(context) == plain
    assert guided != plain
    assert guided[0].manifest.method == f"id*{method.name}"
    assert guided[0].manifest.parameters["id_factors"] == factors.fingerprint
    if not published:
        assert guided[0].removed == plain[0].removed == int(0.75 * plain[0].total)


def test_without_blocks_chita_says_what_to_give_before_it_takes_gradients(context, factors):
    method = chita(lambda_=0.1, block_size=None).with_factors(factors)
    for work in (method.run, method.cost):
        with pytest.raises(UnsupportedError, match="give a block size"):
            work(context)


def test_chita_plus_plus_goes_on_from_stages_of_the_same_factors_only(factors, tmp_path):
    context = context_of(workplace=tmp_path)
    method = chita_plus_plus(lambda_=0.1, block_size=20, rounds=2)
    method.run(context)
    method.with_factors(factors).run(context)
    method.with_factors({name: 1 / value for name, value in factors.items()}).run(context)
    assert len(list(tmp_path.glob("stages-*"))) == 3


def test_mask_training_starts_from_magnitude_times_factor(context, factors):
    method = Tamt(steps=1, lr=1e-12)
    plain = Composition("omp", Magnitude()).with_factors(factors)
    expected = plain.masks(context)
    assert method.with_factors(factors).run(context) == expected


@pytest.mark.parametrize("method", [chita_with(), Tamt(steps=2), itersnip(rounds=2)])
def test_budgets_by_dimension_are_met_by_procedures(context, factors, method):
    allocation = IdAllocation(factors)
    for masks, target in zip(
        method.with_allocation(allocation).run(context), context.targets, strict=True
    ):
        total = context.weights.numel
        budgets = allocation.kept(context.weights, total - int(target * total))
        counts = masks.counts().by_modality
        assert {modality: count.kept for modality, count in counts.items()} == budgets
        assert masks.manifest.parameters["allocation"] == "id"


def test_a_pattern_is_refused_wherever_it_comes_from(factors):
    for method in (
        Tamt(allocation=Pattern(1, 2)),
        Iterative(Composition("m", Magnitude(), Pattern(1, 2))),
    ):
        with pytest.raises(UnsupportedError, match="give another allocation"):
            method.with_factors(factors)
    with pytest.raises(UnsupportedError, match="give another allocation"):
        Tamt().with_factors(factors).with_allocation(Pattern(1, 2))


def test_factors_are_given_once(factors):
    for method in (chita(), chita_plus_plus(), itersnip(), Tamt()):
        with pytest.raises(UnsupportedError, match="has factors already"):
            method.with_factors(factors).with_factors(factors)


def test_the_model_is_left_as_it_was(factors):
    context = context_of()
    before = {name: value.clone() for name, value in context.model.state_dict().items()}
    chita_with().with_factors(factors).run(context)
    assert all(torch.equal(value, before[n]) for n, value in context.model.state_dict().items())
    assert losing_toy().state_dict().keys() == before.keys()
