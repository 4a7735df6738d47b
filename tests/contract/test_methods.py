"""What every registered method has to keep, on a small model with tied weights."""

from pathlib import Path

import pytest
import torch
from transformers import BatchEncoding

from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_plugins.calibration.batches import interleave, to_device
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.dimension.profile import IdProfile, LayerDimension
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context, Procedure
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import gather, measure_id, prune
from vlp_plugins.runtime.errors import DataError, StatisticsError
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.selection import RowSelection
from vlp_plugins.structured.check import outputs
from vlp_plugins.tasks.classification import classification
from vlp_plugins.tasks.finetuning.finetune import finetune
from vlp_plugins.tasks.retrieval import retrieval
from vlp_plugins.tasks.sensitivity.measure import sensitivity

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"
METHODS = registry().method_names()
PUBLISHED = [name for name in METHODS if name not in ("lamp-tamt", "alps+", "refit")]
"""Those that have a published variant."""
QUICK = {
    "chita": {"lambda": 0.1},
    "chita++": {"lambda": 0.1, "rounds": 2},
    "itersnip": {"rounds": 2},
}
"""Parameters with which methods take less time and are the same methods."""


@pytest.fixture(scope="module")
def model():
    return model_from_golden(GOLDEN)


@pytest.fixture(scope="module")
def batches():
    return batches_from_golden(GOLDEN)[:4]


def expected_removals(method, weights, sparsity):
    """int(sparsity x N), rounded down once in every scope of the method's allocation."""
    scopes = {
        "global": [weights.numel],
        "das": [weights.numel],
        "modality": [sum(w.numel for w in g) for g in weights.by_modality().values()],
        "layer": [weight.numel for weight in weights.values()],
        "row": [w.matrix.shape[1] for w in weights.values() for _ in range(w.matrix.shape[0])],
    }
    return sum(int(sparsity * n) for n in scopes[make_method(registry(), method).allocation.name])


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_exact_and_the_same_one_by_one(model, batches, method):
    sparsities = [0.5, 0.9]

    masks = prune(model, batches, method=method, sparsity=sparsities)

    weights = WeightMap.of(model, registry().adapter_for(model))
    for asked, each in zip(sparsities, masks, strict=True):
        assert each.removed == expected_removals(method, weights, asked)
        assert each == prune(model, batches, method=method, sparsity=asked)
        assert each.manifest.method == method


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_it_declares(model, batches, monkeypatch, name):
    gradients = []
    for taking in ("measure", "hand_over"):
        take = getattr(LossProbe, taking)
        monkeypatch.setattr(
            LossProbe, taking, lambda *args, take=take: gradients.append(1) or take(*args)
        )
    method = make_method(registry(), name, **QUICK.get(name, {}))

    masks = prune(model, batches, method=method, sparsity=[0.5, 0.9])

    assert all((each.new_values is not None) == method.changes_weights for each in masks)
    assert bool(gradients) == method.takes_gradients
    assert method.reads_data or not gradients
    cost = method.relative_cost.removesuffix(", and a solver")
    if method.takes_gradients:
        assert cost == {4: "3", 8: "3 per sparsity"}[len(gradients)]
    elif getattr(method, "tokens", None) is not None:
        assert cost == "3 per sparsity"
    else:
        assert cost == str(int(method.reads_data))


@pytest.mark.parametrize(
    ("method", "variant"),
    [*((name, "default") for name in METHODS), *((name, "published") for name in PUBLISHED)],
)
def test_the_model_is_left_as_it_was(batches, method, variant):
    model = model_from_golden(GOLDEN).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanting = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    random = torch.random.get_rng_state()

    prune(model, batches[:2], method=method, sparsity=0.5, variant=variant)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad == wanting[name] for name, p in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


class Halving(torch.nn.Module):
    """Changes its input in place, as forwards that normalise it do, unless it is told not to."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
        )

    def forward(self, images):
        halves = images.div_(2) if self.in_place else images / 2
        return self.layers(halves + 1)


def halving(in_place):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Halving(in_place)
    loss = torch.nn.functional.cross_entropy
    return model, ModuleAdapter(model, loss=lambda model, pair: loss(model(pair[0]), pair[1]))


def labelled():
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 6, generator=rng), torch.arange(5) % 4) for _ in range(6)]


def unchanged(batches):
    pairs = zip(batches, labelled(), strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", [*METHODS, "id*multiflow", "id*itersnip"])
def test_a_forward_that_changes_its_input_changes_no_batch(method):
    masks = []
    for in_place in (False, True):
        (model, adapter), batches = halving(in_place), labelled()
        options = QUICK.get(method, {}) | {"memory_budget": "1MiB"}
        masks.append(prune(model, batches, adapter=adapter, method=method, sparsity=0.5, **options))
        assert unchanged(batches)

    assert masks[1] == masks[0]


WRONG = {
    "tensor": (torch.zeros(8, 6), r"a single batch; .*Tensor of shape \[8, 6\].*\[batch\]"),
    "array": (torch.zeros(8, 6).numpy(), r"a single batch; .*ndarray of shape \[8, 6\]"),
    "dict": ({"images": torch.zeros(8, 6)}, r"a single batch; .*dict.*\[batch\]"),
    "encoding": (
        BatchEncoding({"input_ids": torch.zeros(2, 3)}),
        "a single batch; .*BatchEncoding",
    ),
    "text": ("photos", "'photos' is a str, not batches"),
    "number": (3, "3 is a int, not batches"),
}


@pytest.mark.parametrize(("batches", "message"), WRONG.values(), ids=WRONG)
def test_a_single_batch_is_no_list_of_batches(batches, message):
    model, adapter = halving(in_place=False)
    works = [
        lambda: gather(model, batches, adapter=adapter),
        lambda: measure_id(model, batches, adapter=adapter),
        lambda: sensitivity(model, batches, adapter=adapter),
        lambda: classification(model, registry().adapter("vit"), batches),
        lambda: retrieval(model, adapter, batches).final,
        lambda: finetune(model, adapter, batches, task="pretraining"),
        lambda: next(interleave([], batches)),
    ]
    for method in METHODS:
        if reads_data(method):
            works.append(
                lambda m=method: prune(model, batches, adapter=adapter, method=m, sparsity=0.5)
            )
    assert len(works) > 12
    for work in works:
        with pytest.raises(DataError, match=message):
            work()


def reads_data(name):
    """Whether a method reads data."""
    method = make_method(registry(), name)
    return method.reads_data if isinstance(method, Procedure) else bool(method.needs)


@pytest.mark.parametrize("form", ["tensor", "pair", "list", "mapping"])
def test_a_batch_on_the_device_already_is_copied(form):
    images, labels = labelled()[0]
    batch = {
        "tensor": images,
        "pair": (images, labels),
        "list": [images, labels],
        "mapping": {"images": images, "more": [images]},
    }[form]
    model, adapter = halving(in_place=True)

    given = to_device(batch, torch.device("cpu"))
    for stream in adapter.streams(model, given):
        stream.run()
    outputs(model, adapter, batch)

    assert type(given) is type(batch)
    assert torch.equal(images, labelled()[0][0])


@pytest.mark.parametrize("method", METHODS)
def test_a_procedure_says_what_it_costs_before_it_has_data(model, method):
    procedure = make_method(registry(), method)
    if not isinstance(procedure, Procedure):
        return
    adapter = registry().adapter_for(model)
    weights = WeightMap.of(model, adapter)

    costs = [
        procedure.cost(Context(model, adapter, weights, (), targets=targets, limit=8))
        for targets in ([0.5], [0.5, 0.75])
    ]

    assert costs[0].ram_bytes >= 4 * weights.numel
    assert costs[1].gradient_batches >= costs[0].gradient_batches >= 8
    assert costs[1].passes >= costs[0].passes >= 1


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_have_one_mask_and_stay_tied(batches, method, tmp_path):
    model = model_from_golden(GOLDEN)
    masks = prune(model, batches, method=method, sparsity=0.75)
    masks.save(tmp_path / "masks.safetensors")
    Masks.load(tmp_path / "masks.safetensors").apply(model)

    encoder = model.get_parameter("text_encoder.encoder.layer.0.output.dense.weight")
    decoder = model.get_parameter("text_decoder.bert.encoder.layer.0.output.dense.weight")
    assert encoder is decoder
    assert torch.equal(encoder != 0, masks["text.0.ffn.fc2"])


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_published_variant_removes_about_as_much(model, batches, method):
    masks = prune(model, batches, method=method, sparsity=0.75, variant="published")

    assert masks.sparsity == pytest.approx(0.75, abs=0.02)
    assert masks.manifest.parameters["variant"] == "published"


@pytest.mark.parametrize("method", METHODS)
def test_data_is_asked_for_exactly_where_it_is_needed(model, batches, method):
    if make_method(registry(), method).reads_data:
        with pytest.raises(StatisticsError, match="needs data"):
            prune(model, method=method, sparsity=0.5)
    else:
        assert prune(model, method=method, sparsity=0.5) == prune(
            model, batches, method=method, sparsity=0.5
        )


def profile_of(weights, dimension_of):
    """A profile that says `dimension_of(index)` of the weight with that index."""
    layers = tuple(
        LayerDimension(
            name, "s", 0, name, weight.modality, weight.depth, dimension_of(i), 0.1, 10, 30
        )
        for i, (name, weight) in enumerate(weights.items())
    )
    return IdProfile(layers, weights.structure, weights.adapter_name)


class AsMany(Allocation):
    """As many elements of every tensor as other masks remove."""

    name = "as many"

    def __init__(self, masks, *, in_rows):
        self.counts = {name: int((~masks[name]).sum()) for name in masks}
        self.in_rows = in_rows

    def select(self, scored, targets, *, floor=0.0):
        selections = {}
        for name, weight in scored.weights.items():
            rows, count = weight.rows_and_columns[0], self.counts[name]
            if self.in_rows:
                selections[name] = RowSelection(count // rows, rows, count % rows)
            else:
                selections |= scored.subset([name]).cuts([count])[0]
        return [selections]


@pytest.mark.parametrize("method", METHODS)
def test_dimensions_change_how_much_every_layer_loses_and_no_ranking(model, batches, method):
    weights = WeightMap.of(model, registry().adapter_for(model))
    options = {"sparsity": 0.75, **QUICK.get(method, {})}
    differing = profile_of(weights, lambda i: 1.5 * 3 ** (i % 4))
    equal = profile_of(weights, lambda i: 3.1)

    plain = prune(model, batches, method=method, **options)
    guided = prune(model, batches, method=f"id*{method}", id_profile=differing, **options)
    same = prune(model, batches, method=f"id*{method}", id_profile=equal, **options)

    assert guided.manifest.method == f"id*{method}"
    assert guided.manifest.parameters["id_factors"]
    assert guided != plain
    assert guided.removed == plain.removed
    assert same == plain
    composition = make_method(registry(), method)
    if isinstance(composition, Composition):
        in_rows = composition.allocation.name in ("row", "das")
        as_many = composition.with_allocation(AsMany(guided, in_rows=in_rows))
        assert prune(model, batches, method=as_many, sparsity=0.75) == guided


@pytest.mark.parametrize("method", METHODS)
def test_budgets_by_dimension_are_exact_and_in_proportion(model, batches, method):
    weights = WeightMap.of(model, registry().adapter_for(model))
    profile = profile_of(weights, lambda i: 1.0 + i % 3)
    options = {"sparsity": 0.75, "id_profile": profile, **QUICK.get(method, {})}

    masks = prune(model, batches, method=method, allocation="id", **options)

    assert masks.removed == int(0.75 * weights.numel)
    densities = {m: c.kept / (c.kept + c.removed) for m, c in masks.counts().by_modality.items()}
    means = {
        modality: sum(w.numel * (1.0 + list(weights).index(w.name) % 3) for w in members)
        / sum(w.numel for w in members)
        for modality, members in weights.by_modality().items()
    }
    level = {m: densities[m] / means[m] for m in means}
    assert max(level.values()) == pytest.approx(min(level.values()), rel=1e-2)
