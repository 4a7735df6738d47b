"""prune(): three lines that fit every method, target and allocation together."""

from pathlib import Path

import pytest
import torch

from benchmarks.parity.xvlm import batches_from_golden, model_from_golden
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import gather, measure_id, prune
from vlp_plugins.runtime.errors import (
    DataError,
    SparsityError,
    StatisticsError,
    UnclaimedModelError,
    UnknownNameError,
    UnsupportedError,
)
from vlp_plugins.scoring.allocation import ModalityAllocation, Pattern
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.tasks.sensitivity.measure import sensitivity

GOLDEN = Path(__file__).parent / "golden" / "xvlm"
TOTAL = ("vision", "text", "fusion")


@pytest.fixture(scope="module")
def model():
    return model_from_golden(GOLDEN)


@pytest.fixture(scope="module")
def batches():
    return batches_from_golden(GOLDEN)


def counts(masks):
    return {name: count.removed for name, count in masks.counts().by_modality.items()}


def test_one_sparsity_gives_masks_and_several_give_a_list_from_one_pass(model, batches):
    reads = []

    def loader():
        for batch in batches:
            reads.append(1)
            yield batch

    single = prune(model, loader(), method="multiflow", sparsity=0.75)
    assert len(reads) == 6
    several = prune(model, loader(), method="multiflow", sparsity=[0.63, 0.75, 0.9])

    assert len(reads) == 12
    assert several[1] == single
    assert [round(m.sparsity, 3) for m in several] == [0.63, 0.75, 0.9]


def test_every_modality_of_multiflow_is_pruned_to_the_target(model, batches):
    sizes = {m: sum(w.numel for w in g) for m, g in
             WeightMap.of(model, registry().adapter("xvlm")).by_modality().items()}  # fmt: skip

    masks = prune(model, batches, sparsity=0.75)

    assert counts(masks) == {name: int(0.75 * n) for name, n in sizes.items()}


def test_the_model_is_left_as_it_was(model, batches):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    state = torch.get_rng_state()

    prune(model, batches, sparsity=0.9)

    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()


def test_applied_masks_make_the_model_that_sparse(batches):
    model = model_from_golden(GOLDEN)
    masks = prune(model, batches, sparsity=0.9)

    assert masks.verify(model)
    masks.apply(model)
    assert masks.verify(model) == []


@pytest.mark.parametrize("method", ["random", "omp", "magnitude", "lamp", "l2"])
def test_methods_without_data_need_none_and_remove_exactly_the_target(model, method):
    masks = prune(model, method=method, sparsity=0.63)

    assert masks.removed == int(0.63 * masks.total)
    assert masks.manifest.calibration is None


def test_statistics_of_one_pass_serve_other_sparsities_without_data(model, batches, tmp_path):
    from vlp_plugins.calibration.data_pass import calibrate

    adapter = registry().adapter_for(model)
    weights = WeightMap.of(model, adapter)
    method = make_method(registry(), "multiflow")
    calibrate(model, adapter, weights, batches, method.needs).save(tmp_path / "s.safetensors")

    reused = prune(model, sparsity=0.8, statistics=Statistics.load(tmp_path / "s.safetensors"))

    assert reused == prune(model, batches, sparsity=0.8)


def test_the_halves_of_the_data_tell_whether_it_was_enough(model, batches):
    from vlp_plugins.calibration.data_pass import calibrate

    adapter = registry().adapter_for(model)
    weights = WeightMap.of(model, adapter)
    method = make_method(registry(), "multiflow")
    statistics = calibrate(model, adapter, weights, batches, method.needs)

    context = Context(model, adapter, weights, targets=[0.75])
    one, other = (method.masks(context, statistics, half=h)[0] for h in (0, 1))

    assert 0.9 < one.compare(other)["all"].agreement < 1


def test_budgets_by_modality_need_no_word_about_the_allocation(model):
    budget = {"vision": 0.5, "text": 0.8, "fusion": 0.0}

    masks = prune(model, method="omp", sparsity=budget)

    by_modality = masks.counts().by_modality
    assert {m: round(c.sparsity, 3) for m, c in by_modality.items()} == budget
    assert masks.manifest.parameters["allocation"] == "modality"


def test_a_pattern_brings_its_own_sparsity(model):
    masks = prune(model, method="omp", allocation=Pattern(keep=2, of=4))

    assert masks.sparsity == 0.5
    mask = masks["vision.0.mlp.fc1"]
    assert mask.view(-1, 4).sum(1).unique().tolist() == [2]


def test_a_floor_keeps_layers_alive_that_global_pruning_empties(model):
    kept = {}
    for floor in (0.0, 0.05):
        masks = prune(model, method="omp", sparsity=0.9, floor=floor)
        kept[floor] = min(1 - c.sparsity for c in masks.counts().by_weight.values())
        assert masks.removed == int(0.9 * masks.total)

    assert kept[0.0] < 0.05 <= kept[0.05]


def test_multiflow_s_parts_can_be_switched_off(model, batches):
    both, edges, nodes = (
        prune(model, batches, sparsity=0.75, **switch)
        for switch in ({}, {"nodes": False}, {"edges": False})
    )

    assert edges != both != nodes
    assert counts(edges) == counts(both) == counts(nodes)
    assert edges.manifest.parameters["nodes"] is False


def test_an_allocation_of_one_s_own_is_kept_under_budgets(model):
    class Mine(ModalityAllocation):
        """Named otherwise, to be told apart."""

        name = "mine"

    masks = prune(model, method="omp", allocation=Mine(), sparsity=dict.fromkeys(TOTAL, 0.5))

    assert masks.manifest.parameters["allocation"] == "mine"


def test_numbers_of_numpy_and_torch_are_numbers(model):
    import numpy as np

    expected = prune(model, method="omp", sparsity=0.75)

    assert prune(model, method="omp", sparsity=np.float32(0.75)) == expected
    assert prune(model, method="omp", sparsity=torch.tensor(0.75)) == expected
    assert prune(model, method="omp", sparsity=np.array([0.75]))[0] == expected


def test_a_scorer_is_a_method_with_global_allocation(model):
    assert prune(model, method=Magnitude(), sparsity=0.5) == prune(
        model, method="omp", sparsity=0.5
    )


def test_owners_decide_whose_inputs_count_for_tied_weights():
    from benchmarks.parity import blip

    golden = GOLDEN.parent / "blip"
    model, batches = blip.model_from_golden(golden), blip.batches_from_golden(golden)

    every = prune(model, batches, sparsity=0.75)
    first = prune(model, batches, sparsity=0.75, owners="first")

    overlap = every.compare(first)
    assert overlap["vision"].differing == 0
    assert overlap["text"].differing > 0
    own = [name for name in every if name.startswith("decoder.")]
    assert all(torch.equal(every[name], first[name]) for name in own)


def test_a_composition_of_one_s_own_needs_no_registration(model):
    mine = Composition("mine", Magnitude(), allocation=make_method(registry(), "wanda").allocation)

    assert prune(model, method=mine, sparsity=0.5).manifest.method == "mine"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "multiflw", "sparsity": 0.5}, UnknownNameError, "did you mean 'multiflow'"),
        ({"sparsity": 0.5}, StatisticsError, "needs data: give batches"),
        ({"sparsity": 0.5, "batches": {"input_ids": 1}}, DataError, "a single batch"),
        ({"method": "omp", "sparsity": 0.5, "owners": "frist"}, UnsupportedError, "mean 'first'"),
        ({"method": None, "sparsity": 0.5}, UnsupportedError, "give a name, a Scorer"),
        ({"method": "omp", "sparsity": "0.75"}, SparsityError, "is not a sparsity"),
        ({"method": "omp", "sparsity": {}}, SparsityError, "mapping of sparsities is empty"),
        ({"method": "omp", "sparsity": 0.5, "adapter": int}, UnsupportedError, "is no adapter"),
        ({"method": "omp"}, SparsityError, "no sparsity given"),
        ({"method": "omp", "sparsity": 63}, SparsityError, "did you mean 0.63"),
        ({"method": "omp", "sparsity": []}, SparsityError, "list of sparsities is empty"),
        ({"method": "omp", "sparsity": 0.5, "variant": "publised"}, UnsupportedError,
         "did you mean 'published'"),
        ({"method": "multiflow", "sparsity": 0.5, "edge": 1}, UnknownNameError, "edge"),
        ({"method": "multiflow", "sparsity": 0.5, "edges": "no"}, UnsupportedError,
         "edges='no' is neither True nor False"),
        ({"method": "multiflow", "sparsity": 0.5, "nodes": 0}, UnsupportedError, "nodes=0 is"),
        ({"sparsity": 0.5, "limit": 2.5}, UnsupportedError, "limit=2.5 is not a whole number"),
        ({"sparsity": 0.5, "limit": "2"}, UnsupportedError, "limit='2' is not a whole number"),
        ({"sparsity": 0.5, "limit": True}, UnsupportedError, "limit=True is not a whole number"),
        ({"sparsity": 0.5, "checkpoint_every": 1.5}, UnsupportedError, "checkpoint_every=1.5"),
        ({"method": "random", "sparsity": 0.5, "seed": 0.5}, UnsupportedError, "seed=0.5 is no"),
        ({"sparsity": 0.5, "skip_nonfinite": "no"}, UnsupportedError, "skip_nonfinite='no' is"),
        ({"sparsity": 0.5, "resume": 1}, UnsupportedError, "resume=1 is neither"),
        ({"method": "omp", "sparsity": 0.5, "floor": "0.1"}, SparsityError, "not '0.1'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_any_work(model, options, error, message):
    with pytest.raises(error, match=message):
        prune(model, **options)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (gather, {"limit": 2.5}, "limit=2.5"),
        (gather, {"skip_nonfinite": "yes"}, "skip_nonfinite='yes'"),
        (measure_id, {"limit": 2.5}, "limit=2.5"),
        (measure_id, {"resume": "no"}, "resume='no'"),
        (sensitivity, {"seed": 1.5}, "seed=1.5"),
        (sensitivity, {"retrieve": "no"}, "retrieve='no'"),
    ],
)
def test_every_entry_checks_whole_numbers_and_flags(model, batches, function, options, message):
    with pytest.raises(UnsupportedError, match=message):
        function(model, batches, **options)


def test_whole_numbers_may_be_written_as_floats_or_be_of_numpy(model, batches):
    import numpy as np

    expected = prune(model, batches, sparsity=0.75, limit=2)
    for limit in (2.0, np.int64(2), np.float64(2)):
        assert prune(model, batches, sparsity=0.75, limit=limit, resume=np.False_) == expected


@pytest.mark.parametrize("method", registry().method_names())
@pytest.mark.parametrize("allocation", [None, "row"])
def test_layers_without_inputs_or_outputs_have_nothing_to_remove(method, allocation):
    class Hollow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = torch.nn.Linear(6, 8), torch.nn.Linear(8, 8)
            self.no_inputs, self.no_outputs = torch.nn.Linear(0, 4), torch.nn.Linear(4, 0)

        def forward(self, x):
            nothing = self.no_outputs(self.no_inputs(x[:, :0]))
            return self.out(torch.relu(self.layer(x))) + nothing.sum()

    if allocation and method.startswith("chita"):
        return  # takes no such allocation
    model = Hollow()
    rows = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    adapter = ModuleAdapter(model, loss=lambda model, batch: model(batch).square().mean())
    quick = {"chita": {"lambda": 0.1}, "chita++": {"lambda": 0.1, "rounds": 2}}.get(method, {})

    masks = prune(
        model, list(rows), method=method, sparsity=0.5, adapter=adapter, allocation=allocation,
        **quick,
    )  # fmt: skip

    assert set(masks) == {"layer", "out"}
    assert masks.removed == 56


def test_a_model_that_nobody_claims_is_told_about_module_adapter():
    with pytest.raises(UnclaimedModelError, match="ModuleAdapter"):
        prune(torch.nn.Linear(3, 3), method="omp", sparsity=0.5)


def test_masks_that_remove_nothing_and_data_that_ends_early_are_said(caplog):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert prune(model, adapter="module", method="omp", sparsity=0.0).removed == 0
    assert "sparsity 0.0 remove nothing" in caplog.text
    for method in ("wanda", "id*omp"):
        caplog.clear()
        many = [torch.randn(16, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
        prune(model, many, adapter="module", method=method, sparsity=0.5, limit=1000)
        said = "the data gave 2 batches, fewer than limit=1000; used them all"
        assert caplog.messages.count(said) == 1
