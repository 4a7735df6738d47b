"""Every published score against a naive loop over its formula."""

import math

import pytest
import torch
from torch import nn

from vlp_plugins.methods.composition import Composition
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.allocation import RowAllocation
from vlp_plugins.scoring.information_flow import InformationFlow, information_flow, neuron_saliency
from vlp_plugins.scoring.lamp import Lamp, lamp
from vlp_plugins.scoring.magnitude import Magnitude, Random, layer_l2
from vlp_plugins.scoring.score import Evidence, Scorer
from vlp_plugins.scoring.snip import snip
from vlp_plugins.scoring.threshold import find_cuts
from vlp_plugins.scoring.wanda import wanda


@pytest.fixture
def weight():
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def moment():
    return torch.rand(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 9


def test_information_flow_is_the_product_of_both_neurons_and_the_connection(weight, moment):
    a = [math.sqrt(m) for m in moment.tolist()]
    w = weight.abs().tolist()
    emitted = [sum(w[i][j] * a[j] for j in range(7)) / 7 for i in range(5)]
    received = [sum(w[i][j] * a[j] for i in range(5)) / 5 for j in range(7)]
    expected = [[emitted[i] * received[j] * w[i][j] for j in range(7)] for i in range(5)]

    torch.testing.assert_close(information_flow(weight, moment), torch.tensor(expected))
    outputs, inputs = neuron_saliency(weight, moment)
    torch.testing.assert_close(outputs, torch.tensor(emitted))
    torch.testing.assert_close(inputs, torch.tensor(received))


def test_information_flow_can_look_at_edges_or_nodes_alone(weight, moment):
    edges = information_flow(weight, moment, nodes=False)
    nodes = information_flow(weight, moment, edges=False)

    torch.testing.assert_close(edges, weight.abs())
    torch.testing.assert_close(nodes * edges, information_flow(weight, moment))
    with pytest.raises(UnsupportedError, match="edges, nodes or both"):
        InformationFlow(edges=False, nodes=False)


def test_wanda_scales_columns_by_the_input_norm(weight, moment):
    expected = [[abs(w) * math.sqrt(m) for w, m in zip(row, moment.tolist(), strict=True)]
                for row in weight.tolist()]  # fmt: skip
    torch.testing.assert_close(wanda(weight, moment), torch.tensor(expected))


def test_snip_is_the_change_of_the_loss_to_first_order(weight):
    gradient = torch.randn(35, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = [[abs(w * gradient[7 * i + j].item()) for j, w in enumerate(row)]
                for i, row in enumerate(weight.tolist())]  # fmt: skip
    torch.testing.assert_close(snip(weight, gradient), torch.tensor(expected))
    assert snip(weight.bfloat16(), gradient).dtype == torch.float32


def test_layer_l2_divides_by_the_frobenius_norm(weight):
    norm = math.sqrt(sum(w * w for row in weight.tolist() for w in row))
    torch.testing.assert_close(layer_l2(weight), weight.abs() / norm)
    assert not layer_l2(torch.zeros(2, 2)).any()


@pytest.mark.parametrize("size", [1e-38, 1e-22, 1e21, 1e37])
def test_scores_whose_unit_is_the_layers_own_do_not_depend_on_it(weight, moment, size):
    """Squares of such weights are 0 or infinite in float32."""
    scaled = weight * size
    torch.testing.assert_close(layer_l2(scaled), layer_l2(weight), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lamp(scaled), lamp(weight), rtol=1e-4, atol=1e-6)
    for score in (information_flow, wanda):
        expected = score(weight, moment)
        for found in (score(scaled, moment), score(weight, moment * size), score(scaled, moment)):
            assert bool((found > 0).all())
            torch.testing.assert_close(
                found / found.max(), expected / expected.max(), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("scorer", [layer_l2, lamp])
def test_layers_of_every_size_lose_equal_shares(scorer):
    """A layer that decayed to 1e-22 lost nothing or everything, by its squares."""
    shapes = {"a": (30, 20), "b": (20, 40), "c": (10, 30)}
    sizes = {"a": 1.0, "b": 1e-22, "c": 1e21}
    generator = torch.Generator().manual_seed(5)
    weights = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    plain = {n: (lambda w=w: scorer(w)) for n, w in weights.items()}
    scaled = {n: (lambda w=w, n=n: scorer(w * sizes[n])) for n, w in weights.items()}
    expected = {n: cut.remove for n, cut in find_cuts(plain, [900])[0].items()}
    found = {n: cut.remove for n, cut in find_cuts(scaled, [900])[0].items()}
    assert all(abs(found[n] - expected[n]) <= 2 for n in shapes)


def test_lamp_thresholds_of_the_largest_numbers_there_are():
    largest = torch.finfo(torch.float32).max
    weights = {"a": torch.full((2, 3), largest), "b": torch.arange(6.0).view(2, 3)}
    for removal in (1, 4, 9):
        found = Lamp().global_cuts(weights, [removal])[0]
        assert sum(cut.remove for cut in found.values()) == removal


def test_lamp_divides_by_the_weights_that_are_at_least_as_large(weight):
    flat = weight.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), i))
    expected = [0.0] * len(flat)
    for place, i in enumerate(order):
        expected[i] = flat[i] ** 2 / sum(flat[j] ** 2 for j in order[place:])

    torch.testing.assert_close(lamp(weight).flatten(), torch.tensor(expected))
    assert lamp(weight).max() == 1
    assert not lamp(torch.zeros(3, 3)).any()


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_lamp_thresholds_without_sorting_equal_thresholds_of_its_scores(scale):
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(shape, generator=generator) * width
        for name, shape, width in [("a", (40, 30), 1.0), ("b", (7, 11), 1e-3), ("c", (64, 8), 50.0)]
    }
    if scale:  # coarse values: many ties
        weights = {name: (w / scale).round() * scale for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    removals = [0, 1, total // 3, int(0.9 * total), total - 1, total]

    fast = Lamp().global_cuts(weights, removals)
    slow = find_cuts({name: lambda w=w: lamp(w) for name, w in weights.items()}, removals)

    for removal, quick, exact in zip(removals, fast, slow, strict=True):
        assert sum(cut.remove for cut in quick.values()) == removal
        for name, weight in weights.items():
            # float32 scores merge neighbours that float64 tells apart: counts may differ by those.
            assert abs(quick[name].remove - exact[name].remove) <= 2
            mask = quick[name].mask(weight.abs())
            assert int((~mask).sum()) == quick[name].remove
            if mask.any() and not mask.all():
                assert weight.abs()[mask].min() >= weight.abs()[~mask].max()


def test_random_depends_on_seed_and_name_alone(weight):
    score = Random().score
    first = score(weight, Evidence("vision.0.mlp.fc1", seed=0))

    assert torch.equal(first, score(weight * 3, Evidence("vision.0.mlp.fc1", seed=0)))
    assert not torch.equal(first, score(weight, Evidence("vision.0.mlp.fc1", seed=1)))
    assert not torch.equal(first, score(weight, Evidence("vision.0.mlp.fc2", seed=0)))


def test_scores_are_float32_whatever_the_dtype_of_the_weight(weight):
    half = weight.bfloat16()
    scores = Magnitude().score(half, Evidence("a"))

    assert scores.dtype == torch.float32
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (lambda weight: None, "returned NoneType for"),
        (lambda weight: weight.abs().tolist(), "returned list for"),
        (lambda weight: weight.abs().numpy(), "returned ndarray for"),
        (lambda weight: weight.abs().sum(), r"returned float32 of shape \[\] for"),
        (lambda weight: weight.abs().mean(0), r"returned float32 of shape \[4\] for"),
        (lambda weight: weight.T, r"returned float32 of shape \[4, 3\] for"),
        (lambda weight: weight > 0, r"returned bool of shape \[3, 4\] for"),
    ],
)
def test_a_score_of_a_wrong_kind_names_its_scorer(returned, what):
    class Odd(Scorer):
        name = "odd"

        def score(self, weight, evidence):
            return returned(weight)

    model = nn.Sequential(nn.Linear(4, 3))
    adapter = ModuleAdapter(model)
    for method in (Odd(), Composition("rows", Odd(), RowAllocation())):
        with pytest.raises(UnsupportedError, match=f"scorer 'odd' {what} weight '0'; a score is a"):
            prune(model, method=method, sparsity=0.5, adapter=adapter)


def test_a_score_in_another_floating_dtype_is_taken():
    class Half(Scorer):
        name = "half"

        def score(self, weight, evidence):
            return weight.abs().double()

    model = nn.Sequential(nn.Linear(4, 3))
    options = {"sparsity": 0.5, "adapter": ModuleAdapter(model)}
    found = prune(model, method=Half(), **options)
    assert torch.equal(found["0"], prune(model, method=Magnitude(), **options)["0"])


@pytest.mark.parametrize(
    ("base", "text"), [(BaseException, ", which is not an Exception"), (ValueError, "$")]
)
def test_an_error_of_a_scorer_names_it_and_the_weight(base, text):
    class Ending(Scorer):
        name = "ending"

        def score(self, weight, evidence):
            raise type("Own", (base,), {})("odd")

    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(
        UnsupportedError, match=f"^weight '0': scorer 'ending' raises Own: odd{text}"
    ):
        prune(model, method=Ending(), sparsity=0.5, adapter=ModuleAdapter(model))


@pytest.mark.parametrize("message", ["CUDA out of memory", "can't allocate memory"])
def test_a_full_memory_is_no_fault_of_a_scorer(message):
    class Full(Scorer):
        name = "full"

        def score(self, weight, evidence):
            raise RuntimeError(message)

    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match=message):
        prune(model, method=Full(), sparsity=0.5, adapter=ModuleAdapter(model))
