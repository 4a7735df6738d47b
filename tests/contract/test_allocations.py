"""What every registered allocation has to keep, ours and any outsider's that is installed."""

import json
from pathlib import Path

import pytest
import torch
from factor_towers import profile_of

from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import DataError, SparsityError, UnsupportedError, VlpError
from vlp_plugins.scoring.allocation import allocation_by_name

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"
ALLOCATIONS = registry().names("allocations")
PER_SCOPE = {"modality": "modalities", "layer": "tensors", "row": "rows"}
"""Those that round down once in every scope; all others once in all."""
METHODS = ["wanda", "multiflow", "alps", "itersnip"]
QUICK = {"ecoflap": "ecoflap(batches=1)"}
"""Parameters with which allocations take less time and are the same ones."""


@pytest.fixture(scope="module")
def model():
    return model_from_golden(GOLDEN)


@pytest.fixture(scope="module")
def batches():
    return batches_from_golden(GOLDEN)[:2]


@pytest.fixture(scope="module")
def weights(model):
    return WeightMap.of(model, registry().adapter_for(model))


@pytest.fixture(scope="module")
def profile(weights):
    return profile_of(weights)


@pytest.fixture
def pruned(model, batches, profile):
    def run(allocation, method="wanda", batches=batches, **options):
        if allocation == "id":
            options["id_profile"] = profile
        options = {"sparsity": 0.6, **options}
        allocation = QUICK.get(allocation, allocation)
        return prune(model, batches, method=method, allocation=allocation, **options)

    return run


def outcome(run):
    """What it returns, or the message of the error that it raises."""
    try:
        return run(), ""
    except (SparsityError, UnsupportedError) as error:
        return None, str(error)


def expected(name, weights, sparsity):
    scopes = {
        "modalities": [sum(w.numel for w in g) for g in weights.by_modality().values()],
        "tensors": [weight.numel for weight in weights.values()],
        "rows": [w.rows_and_columns[1] for w in weights.values() for _ in range(w.shape[0])],
    }
    return sum(int(sparsity * n) for n in scopes.get(PER_SCOPE.get(name), [weights.numel]))


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_it_is_registered_under_its_own_name(name):
    allocation = allocation_by_name(name)

    assert allocation.name == name
    assert type(allocation).__doc__
    assert json.loads(json.dumps(allocation.record()))["allocation"] == name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_any_method_takes_it_and_counts_are_exact(pruned, weights, name, method):
    options = {"rounds": 2} if method == "itersnip" else {}

    several = pruned(name, method, sparsity=[0.6, 0.9], **options)

    for sparsity, masks in zip([0.6, 0.9], several, strict=True):
        assert masks.removed == expected(name, weights, sparsity)
        assert masks.manifest.parameters["allocation"] == name
    assert several[0] == pruned(name, method, **options)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_the_model_is_left_as_it_was(batches, profile, name):
    model = model_from_golden(GOLDEN).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.random.get_rng_state()

    options = {"id_profile": profile} if name == "id" else {}
    allocation = QUICK.get(name, name)
    prune(model, batches, method="omp", allocation=allocation, sparsity=0.5, **options)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters() if p.requires_grad)
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_floor_is_kept_or_refused(pruned, weights, name):
    masks, refused = outcome(lambda: pruned(name, "multiflow", sparsity=0.7, floor=0.25))
    if masks is None:
        assert "floor" in refused
        return
    assert masks.removed == expected(name, weights, 0.7)
    for weight in weights:
        assert masks[weight].float().mean() >= 0.25


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_budgets_per_modality_are_exact_or_refused(pruned, weights, name):
    budget = {"vision": 0.0, "text": 0.6, "fusion": 0.4}
    budget = {modality: budget.get(modality, 0.5) for modality in weights.by_modality()}
    if not allocation_by_name(name).takes_budgets:
        with pytest.raises(SparsityError, match="one sparsity"):
            pruned(name, sparsity=budget)
        return

    masks = pruned(name, sparsity=budget)

    if name not in ("row", "layer"):
        for modality, members in weights.by_modality().items():
            removed = sum(int((~masks[weight.name]).sum()) for weight in members)
            assert removed == int(budget[modality] * sum(weight.numel for weight in members))
    assert all(masks[weight.name].all() for weight in weights.by_modality()["vision"])


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_the_published_variant_prunes_about_as_much(pruned, weights, name):
    masks = pruned(name, variant="published")

    assert masks.removed == pytest.approx(0.6 * weights.numel, rel=0.1)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_factors_change_it_or_are_refused(pruned, profile, name):
    masks, refused = outcome(lambda: pruned(name, "id*omp", id_profile=profile))
    if masks is None:
        assert "factors" in refused
        return
    assert masks.manifest.method == "id*omp"
    assert masks != pruned(name, "omp")


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_what_has_to_run_the_model_says_so_without_batches(pruned, name):
    if name == "id" or allocation_by_name(name).measured:
        return  # profiles have tests of their own
    for batches in (None, []):
        with pytest.raises(VlpError, match=r"give batches|no batch"):
            pruned(name, "omp", batches=batches)
    with pytest.raises(DataError, match="can be read once"):
        pruned(name, batches=iter([]))
