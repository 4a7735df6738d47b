"""`id*NAME` and the allocation `id` by name: with a profile, or measured first."""

from dataclasses import replace

import pytest
from factor_towers import profile_of
from toy import ToyAdapter, toy_batches, toy_model
from toy_loss import LosingAdapter, losing_toy

from vlp_plugins.dimension import measure as usual
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.guided import IdGuided
from vlp_plugins.methods.method import Context, Procedure
from vlp_plugins.methods.resolve import make_method, resolve_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import gather, measure_id, prune, split_half
from vlp_plugins.runtime.errors import (
    DataError,
    StatisticsError,
    UnknownNameError,
    UnsupportedError,
)
from vlp_plugins.scoring.allocation import IdAllocation
from vlp_plugins.scoring.magnitude import Magnitude

BATCHES = toy_batches(10, size=4)


@pytest.fixture
def model():
    return losing_toy()


@pytest.fixture
def weights(model):
    return WeightMap.of(model, LosingAdapter())


@pytest.fixture
def profile(weights):
    return profile_of(weights)


def pruned(model, **options):
    return prune(model, **{"adapter": LosingAdapter(), "sparsity": 0.75, **options})


@pytest.mark.parametrize("method", ["omp", "lamp", "multiflow", "wanda"])
def test_with_a_profile_it_is_the_composition_itself(model, weights, profile, method):
    found = pruned(model, batches=BATCHES, method=f"id*{method}", id_profile=profile)

    factors = profile.factors(weights, "all")
    by_hand = make_method(registry(), method).with_factors(factors)
    assert found == pruned(model, batches=BATCHES, method=by_hand)
    assert found != pruned(model, batches=BATCHES, method=method)
    assert found.manifest.method == f"id*{method}"
    assert found.manifest.parameters["id_profile"] == {"owners": "all", **profile.settings}


def test_a_saved_profile_serves_as_well(model, profile, tmp_path):
    profile.save(tmp_path / "profile.json")
    masks = pruned(model, method="id*omp", id_profile=tmp_path / "profile.json")
    assert masks == pruned(model, method="id*omp", id_profile=profile)


def test_with_a_profile_statistics_are_used_again(model, profile):
    statistics = gather(model, BATCHES, adapter=LosingAdapter(), method="id*multiflow")
    given = {"method": "id*multiflow", "id_profile": profile}
    assert pruned(model, statistics=statistics, **given) == pruned(model, batches=BATCHES, **given)

    halves = split_half(model, statistics, adapter=LosingAdapter(), sparsity=0.75, **given)
    assert 0 < halves["all"].agreement < 1
    with pytest.raises(UnsupportedError, match="measure them by measure_id"):
        split_half(model, statistics, adapter=LosingAdapter(), sparsity=0.75, method="id*multiflow")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "id*omp"},
        {"method": "id*multiflow", "allocation": "id"},
        {"method": "omp", "allocation": "id"},
        {"method": "id*itersnip", "rounds": 2},
        {"method": "chita", "lambda": 0.1, "allocation": "id"},
    ],
    ids=str,
)
def test_without_one_the_same_batches_are_measured_first(model, options):
    found = pruned(model, batches=BATCHES, **options)

    measured = measure_id(model, BATCHES, adapter=LosingAdapter())
    assert found == pruned(model, batches=BATCHES, id_profile=measured, **options)
    assert found.manifest.method == options["method"]
    assert found.manifest.parameters["id_profile"]["samples"] == 40


def test_the_published_variant_measures_as_published(model, monkeypatch):
    monkeypatch.setattr(usual, "PUBLISHED_BLOCKS", 2)  # 20 blocks need 400 samples
    found = pruned(model, batches=BATCHES, variant="published", method="id*multiflow")

    measured = measure_id(model, BATCHES, adapter=LosingAdapter(), variant="published")
    given = pruned(
        model, batches=BATCHES, variant="published", method="id*multiflow", id_profile=measured
    )
    assert found == given
    source = found.manifest.parameters["id_profile"]
    assert source["estimator"]["blocks"] == 2
    assert (source["padding"], source["owners"]) == ("published", "first")


def test_owners_of_a_tied_weight_count_as_the_owners_option_says(model):
    measured = measure_id(model, BATCHES, adapter=LosingAdapter())
    both, first = (
        pruned(model, method="id*omp", id_profile=measured, owners=owners)
        for owners in ("all", "first")
    )
    assert both.manifest.parameters["id_factors"] != first.manifest.parameters["id_factors"]


def test_progress_is_told_of_every_pass(model):
    told = []
    pruned(model, batches=BATCHES, method="id*multiflow", progress=lambda *d: told.append(d))
    assert told == [(i, 10) for i in range(1, 11)] * 2


def test_what_was_measured_is_not_measured_again(model, tmp_path):
    told = []
    options = {"method": "id*omp", "batches": BATCHES, "workplace": tmp_path}
    first = pruned(model, **options)
    again = pruned(model, **options, resume=True, progress=lambda *done: told.append(done))
    assert again == first
    assert told == []


def test_factors_and_budgets_are_two_things(model, profile):
    made = {
        (method, allocation): pruned(
            model, method=method, allocation=allocation, **({"id_profile": profile} if asks else {})
        )
        for method, allocation, asks in [
            ("omp", "modality", False),
            ("id*omp", "modality", True),
            ("omp", "id", True),
            ("id*omp", "id", True),
        ]
    }
    counts = {key: masks.counts().by_modality for key, masks in made.items()}
    assert counts["omp", "modality"] == counts["id*omp", "modality"] != counts["omp", "id"]
    assert counts["omp", "id"] == counts["id*omp", "id"]
    assert len({str(masks.packed) for masks in made.values()}) == 4
    assert made["omp", "id"].manifest.method == "omp"
    assert made["omp", "id"].manifest.parameters["allocation"] == "id"


def test_a_generator_serves_a_method_that_reads_data_once(model):
    assert pruned(model, batches=iter(BATCHES), method="id*omp") == pruned(
        model, batches=BATCHES, method="id*omp"
    )
    with pytest.raises(DataError, match=r"'id\*multiflow' measures .* measure_id"):
        pruned(model, batches=iter(BATCHES), method="id*multiflow")


def test_without_batches_and_profile_data_is_asked_for(model):
    with pytest.raises(StatisticsError, match=r"'id\*omp' needs data"):
        pruned(model, method="id*omp")


def test_statistics_alone_are_not_enough(model):
    statistics = gather(model, BATCHES, adapter=LosingAdapter())
    with pytest.raises(StatisticsError, match="measure them by measure_id and give id_profile"):
        pruned(model, statistics=statistics, method="id*multiflow")


def test_a_profile_for_a_method_that_reads_none_is_a_mistake(model, profile):
    with pytest.raises(UnsupportedError, match=r"call it 'id\*omp' or give the allocation 'id'"):
        pruned(model, method="omp", id_profile=profile)


def test_a_profile_of_another_model_is_refused(model, profile):
    smaller = replace(profile, layers=profile.layers[1:])
    with pytest.raises(StatisticsError, match="lacks 1 of the model's"):
        pruned(model, method="id*omp", id_profile=smaller)
    other = replace(profile, adapter="other")
    with pytest.raises(StatisticsError, match="adapter 'other', and this one is of adapter 'toy'"):
        pruned(model, method="id*omp", id_profile=other)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("id*multiflo", r"'multiflo' \(did you mean 'multiflow'\?\)"),
        ("id*", "no method is called ''"),
        ("id*id*omp", r"no method is called 'id\*omp'"),
    ],
)
def test_the_name_behind_the_star_is_a_registered_one(model, method, message):
    with pytest.raises(UnknownNameError, match=message):
        pruned(model, batches=BATCHES, method=method)


def test_parameters_are_those_of_the_method():
    method = resolve_method("id*multiflow", None, [0.5], {"edges": False})
    assert isinstance(method, IdGuided)
    assert method.method.parameters == {"edges": False, "nodes": True}
    with pytest.raises(UnknownNameError, match="has no parameter 'edge'"):
        resolve_method("id*multiflow", None, [0.5], {"edge": False})


def test_what_takes_no_factors_is_refused_before_anything_is_measured(model):
    class Plain(Procedure):
        name = "plain"
        parameters = {}  # noqa: RUF012

        def run(self, context):
            raise NotImplementedError

        def cost(self, context):
            raise NotImplementedError

    with pytest.raises(UnsupportedError, match="'plain' takes no factors"):
        IdGuided(Plain())
    with pytest.raises(UnsupportedError, match="give another allocation"):
        pruned(model, method="id*omp", allocation="keep=1,of=2", sparsity=None)
    with pytest.raises(UnsupportedError, match="takes no other allocation"):
        resolve_method(Plain(), "id", [0.5], {})


def test_an_instance_can_be_guided_too(profile):
    mine = Composition("mine", Magnitude())
    model = toy_model()
    weights = WeightMap.of(model, ToyAdapter())
    masks = prune(
        model, BATCHES, adapter=ToyAdapter(), method=IdGuided(mine), sparsity=0.5,
        id_profile=profile_of(weights),
    )  # fmt: skip
    assert masks.manifest.method == "id*mine"
    assert prune(
        model, BATCHES, adapter=ToyAdapter(), method=mine, allocation=IdAllocation(
            profile_of(weights).factors(weights, "all")
        ), sparsity=0.5,
    ) == prune(
        model, BATCHES, adapter=ToyAdapter(), method=mine, allocation="id", sparsity=0.5,
        id_profile=profile_of(weights),
    )  # fmt: skip


def test_the_cost_of_measuring_is_one_more_pass(model, weights):
    context = Context(model, LosingAdapter(), weights, (), targets=[0.5], limit=8)
    for name in ("omp", "multiflow", "itersnip", "chita"):
        plain = make_method(registry(), name)
        before = (
            plain.cost(context).passes if isinstance(plain, Procedure) else int(plain.reads_data)
        )
        for method in (IdGuided(plain), resolve_method(name, "id", [0.5], {})):
            assert method.cost(context).passes == before + 1
