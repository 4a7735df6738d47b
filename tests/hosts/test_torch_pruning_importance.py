"""Every method as an importance of Torch-Pruning, and scores that follow the cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning_examples import GOLDEN, golden, golden_batches, named, stock_pruner

from benchmarks.parity.blip import batches_from_golden
from vlp_plugins.calibration.moments import INPUT_SECOND_MOMENT
from vlp_plugins.dimension.profile import IdProfile, LayerDimension
from vlp_plugins.hosts.torch_pruning.importance import Importance
from vlp_plugins.hosts.torch_pruning.recorder import Recorder
from vlp_plugins.hosts.torch_pruning.scores import normalised
from vlp_plugins.hosts.torch_pruning.structured import prune_structured
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import StatisticsError, StructureError, UnsupportedError
from vlp_plugins.scoring.information_flow import InformationFlow
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.score import Evidence, Scorer
from vlp_plugins.structured.cuts import patch

QUICK: dict[str, dict[str, Any]] = {
    "chita": {"lambda": 0.1},
    "chita++": {"lambda": 0.1, "rounds": 2},
    "itersnip": {"rounds": 2},
    "tamt": {"steps": 4},
    "lamp-tamt": {"steps": 4},
    "taylor": {"steps": 4},
    "platon": {"steps": 4},
}


def group_of(pruner: Any, model: nn.Module, block: Any) -> Any:
    """The group of all units of a block, from its output layer."""
    output = model.get_submodule(block.output.path)
    columns = list(range(output.in_features))
    return pruner.DG.get_pruning_group(output, tp.prune_linear_in_channels, columns)


@pytest.mark.parametrize("method", registry().method_names())
def test_every_method_cuts_half_of_the_heads_and_units(method: str) -> None:
    model, _ = golden()

    result = prune_structured(model, golden_batches(), importance=method, **QUICK.get(method, {}))

    assert result.removed == {
        ("vision", "heads"): (4, 8),
        ("vision", "ffn"): (96, 192),
        ("text", "heads"): (12, 24),
        ("text", "ffn"): (64, 128),
    }
    assert result.error is not None
    assert result.error <= 1e-5


def test_neurons_of_information_flow_are_the_node_term() -> None:
    weight, moment = torch.randn(3, 5), torch.rand(5)
    evidence = Evidence("w", statistics={INPUT_SECOND_MOMENT: moment})
    norm = moment.sqrt()

    rows, columns = InformationFlow().neurons(weight, evidence)

    for i in range(3):
        expected = sum(abs(weight[i, j]) * norm[j] for j in range(5)) / 5
        assert rows[i] == pytest.approx(float(expected), rel=1e-5)
    for j in range(5):
        expected = sum(abs(weight[i, j]) * norm[j] for i in range(3)) / 3
        assert columns[j] == pytest.approx(float(expected), rel=1e-5)


def test_neurons_of_other_scores_are_means_of_the_elements() -> None:
    weight = torch.randn(3, 5)

    rows, columns = Magnitude().neurons(weight, Evidence("w"))

    assert torch.allclose(rows, weight.abs().mean(1))
    assert torch.allclose(columns, weight.abs().mean(0))


def test_edges_alone_have_no_node_term() -> None:
    evidence = Evidence("w", statistics={INPUT_SECOND_MOMENT: torch.rand(5)})
    weight = torch.randn(3, 5)
    edges = InformationFlow(nodes=False)

    assert torch.equal(
        edges.neurons(weight, evidence)[0], Scorer.neurons(edges, weight, evidence)[0]
    )


def test_a_group_has_the_mean_of_its_layers_each_on_one_scale() -> None:
    model, adapter = golden()
    importance = Importance("magnitude", model, adapter=adapter)
    block = named(model, adapter, "vision.0.attention")

    with stock_pruner(model, adapter, importance) as pruner:
        found = importance(group_of(pruner, model, block))

    layers = [model.get_submodule(part.path).weight.abs() for part in block.parts]
    vectors = [weight.mean(1) for weight in layers[:3]] + [layers[3].mean(0)]
    expected = torch.stack([vector / vector.mean() for vector in vectors]).mean(0)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert float(found.mean()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("how", "unit"), [("mean", Tensor.mean), ("max", Tensor.max)])
def test_vectors_are_brought_to_one_scale(how: str, unit: Any) -> None:
    values = torch.rand(7) + 0.1

    assert float(unit(normalised(values * 100, how))) == pytest.approx(1, rel=1e-5)
    assert torch.equal(normalised(torch.zeros(3), how), torch.zeros(3))
    assert normalised(values, None) is values


def test_elementwise_scores_instead_of_the_node_term_rank_otherwise() -> None:
    model, adapter = golden()
    batches = golden_batches()
    block = named(model, adapter, "text.0.ffn")
    found = []
    for neurons in (True, False):
        importance = Importance("multiflow", model, batches, adapter=adapter, neurons=neurons)
        with stock_pruner(model, adapter, importance) as pruner:
            found.append(importance(group_of(pruner, model, block)))

    assert not torch.equal(found[0].argsort(), found[1].argsort())


@pytest.mark.parametrize("method", ["multiflow", "snip"])
def test_scores_made_before_the_projections_are_split_are_those_of_their_rows(method: str) -> None:
    whole, adapter = golden(whole=True)
    split, _ = golden()
    batches = golden_batches()
    before = Importance(method, whole, batches, adapter=adapter, normalize=None)
    after = Importance(method, split, batches, adapter=adapter, normalize=None)
    adapter.split_fused(whole)
    found = []
    for model, importance in ((whole, before), (split, after)):
        block = named(model, adapter, "vision.1.attention")
        with stock_pruner(model, adapter, importance) as pruner:
            found.append(importance(group_of(pruner, model, block)))

    assert torch.allclose(found[0], found[1], rtol=1e-4)


def test_a_procedure_scores_what_its_masks_keep() -> None:
    model, adapter = golden()
    batches = golden_batches()
    importance = Importance(
        "chita", model, batches, adapter=adapter, normalize=None, sparsities=(0.5, 0.9),
        **QUICK["chita"],
    )  # fmt: skip
    masks: list[Masks] = prune(
        model, batches, method="chita", sparsity=[0.5, 0.9], adapter=adapter, **QUICK["chita"]
    )
    block = named(model, adapter, "text.0.ffn")
    expected = torch.zeros(64)
    for part, dim in ((block.inner[0], 1), (block.output, 0)):
        total = torch.zeros(model.get_submodule(part.path).weight.shape)
        for each in masks:
            keep = each[part.weight]
            total[keep] += each.new_values[part.weight].abs()
        expected += total.mean(dim) / 4  # two masks, two layers

    with stock_pruner(model, adapter, importance) as pruner:
        found = importance(group_of(pruner, model, block))

    assert torch.allclose(found, expected, rtol=1e-5)


def test_intrinsic_dimensions_multiply_layers() -> None:
    model, adapter = golden()
    weights = WeightMap.of(model, adapter)
    layers = tuple(
        LayerDimension(
            n, "s", 0, n, w.modality, w.depth, 4.0 if n == "text.0.ffn.fc1" else 1.0, 0.1, 10, 30
        )
        for n, w in weights.items()
    )
    profile = IdProfile(layers, weights.structure, weights.adapter_name)
    block = named(model, adapter, "text.0.ffn")
    importance = Importance("id*omp", model, adapter=adapter, id_profile=profile)

    with stock_pruner(model, adapter, importance) as pruner:
        found = importance(group_of(pruner, model, block))

    first = model.get_submodule(block.inner[0].path).weight.abs().mean(1)
    second = model.get_submodule(block.output.path).weight.abs().mean(0)
    expected = (first / first.mean() + second / second.mean() / 4) / 2
    assert torch.allclose(found, expected, rtol=1e-5)


def test_intrinsic_dimensions_are_measured_where_nobody_knows_them() -> None:
    model, _ = golden()
    batches = batches_from_golden(GOLDEN)  # 20 samples or more

    result = prune_structured(model, batches, importance="id*multiflow", scope="block kind")

    assert result.removed["text", "ffn"] == (64, 128)


def test_a_scorer_of_an_outsider_is_an_importance() -> None:
    class Signed(Scorer):
        name = "signed"

        def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
            return weight.float().clamp(min=0)

    model, _ = golden()

    assert prune_structured(model, importance=Signed()).removed["text", "ffn"] == (64, 128)


def test_scores_follow_cuts_and_training_between_them() -> None:
    """After each step the importance is that of a fresh one of the cut, trained model.

    Only its statistics are the dense model's, in the rows that are left.
    """
    model, adapter = golden()
    importance = Importance("wanda", model, golden_batches(), adapter=adapter)
    dense = {n: model.get_parameter(n) for n, _ in model.named_parameters()}
    block = named(model, adapter, "text.0.ffn")
    scored = importance._vectors[block.output.weight]
    moment = scored.evidence.statistics[INPUT_SECOND_MOMENT]

    with stock_pruner(model, adapter, importance, steps=3) as pruner:
        recorder = Recorder(pruner.DG, model, adapter)
        for _ in range(3):
            for group in pruner.step(interactive=True):
                group.prune()
            kept = torch.tensor(recorder.record()[block.name].units)
            output = model.get_submodule(block.output.path)
            first = model.get_submodule(block.inner[0].path)
            assert output.in_features == len(kept) == len(first.bias)
            with torch.no_grad():  # a training that leaves no weight as it was
                for parameter in model.parameters():
                    parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            columns = (output.weight.abs() * moment[kept].sqrt()).mean(0).float()
            rows = first.weight.abs() * scored_moment(importance, block).sqrt().float()
            expected = columns / columns.mean() + rows.mean(1) / rows.mean()
            found = importance(group_of(pruner, model, block))
            assert torch.allclose(found, expected / 2, rtol=1e-5)
    assert output.in_features == 32
    assert model.get_submodule(block.output.path).weight is not dense[f"{block.output.path}.weight"]


def scored_moment(importance: Importance, block: Any) -> Tensor:
    return importance._vectors[block.inner[0].weight].evidence.statistics[INPUT_SECOND_MOMENT]


def test_gradients_follow_cuts_of_rows_and_columns() -> None:
    model, adapter = golden()
    importance = Importance("snip", model, golden_batches(), adapter=adapter, normalize=None)
    block = named(model, adapter, "vision.0.mlp")
    name = block.output.weight
    dense = model.get_submodule(block.output.path).weight.detach().clone()
    gradient = importance._vectors[name].evidence.statistics["mean_gradient"].view(dense.shape)
    rows = model.get_submodule(block.inner[0].path).weight.detach().clone()
    other = importance._vectors[block.inner[0].weight].evidence.statistics["mean_gradient"]

    with stock_pruner(model, adapter, importance, steps=2) as pruner:
        recorder = Recorder(pruner.DG, model, adapter)
        pruner.step()
        found = importance(group_of(pruner, model, block))

    kept = list(recorder.record()[block.name].units)
    expected = (dense * gradient).abs().mean(0)[kept] + (
        (rows * other.view(rows.shape)).abs().mean(1)[kept]
    )
    assert torch.allclose(found, expected / 2, rtol=1e-5)


def test_a_layer_cut_behind_its_back_is_an_error_and_refresh_mends_it() -> None:
    model, adapter = golden()
    batches = golden_batches()
    importance = Importance("multiflow", model, batches, adapter=adapter)
    prune_structured(model, importance="magnitude", ratio=0.25)

    with pytest.raises(StructureError, match="refresh"):
        prune_structured(model, importance=importance)
    importance.refresh(model, batches)

    assert prune_structured(model, importance=importance).removed["text", "ffn"] == (48, 96)


def test_refresh_between_the_steps_of_one_pruner() -> None:
    model, adapter = golden()
    importance = Importance("magnitude", model, adapter=adapter)
    result = prune_structured(
        model,
        importance=importance,
        steps=3,
        after_step=lambda step: importance.refresh(model),
    )

    assert result.removed["text", "ffn"] == (64, 128)


def test_two_pruners_one_after_the_other_may_ask_one_importance() -> None:
    model, adapter = golden()
    importance = Importance("multiflow", model, golden_batches(), adapter=adapter)
    for _ in range(2):
        with stock_pruner(model, adapter, importance) as pruner:
            recorder = Recorder(pruner.DG, model, adapter)
            pruner.step()
            patch(model, adapter, recorder.heads())

    assert named(model, adapter, "text.0.ffn").width == 16


def test_data_is_asked_for_where_it_is_needed() -> None:
    model, _ = golden()

    with pytest.raises(StatisticsError, match="needs data"):
        Importance("multiflow", model)
    with pytest.raises(StatisticsError, match="needs data"):
        Importance("chita", model, **QUICK["chita"])
    with pytest.raises(UnsupportedError, match="normalize"):
        Importance("magnitude", model, normalize="median")  # type: ignore[arg-type]


def test_the_model_is_left_as_it_was() -> None:
    model, _ = golden()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    Importance("multiflow", model, batches_from_golden(GOLDEN)[:2])

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Net(nn.Module):
    """Convolutions, flattening, an MLP: nothing that an adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 4 * 4, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.first(images).relu()).relu()
        return self.head(self.hidden(features.flatten(1)).relu())


@pytest.mark.parametrize("method", ["multiflow", "magnitude", "snip"])
def test_any_network_is_pruned_by_plain_torch_pruning(method: str) -> None:
    torch.manual_seed(0)
    model = Net()
    images = torch.randn(2, 3, 4, 4)
    adapter = ModuleAdapter(model, loss=lambda model, batch: model(batch[0]).square().mean())
    importance = Importance(method, model, [(images,)], adapter=adapter)
    pruner = tp.pruner.BasePruner(
        model, images, importance, iterative_steps=2, pruning_ratio=0.5,
        ignored_layers=[model.head], in_channel_groups={}, out_channel_groups={},
    )  # fmt: skip

    pruner.step()
    pruner.step()

    assert (model.first.out_channels, model.second.out_channels) == (4, 3)
    assert (model.hidden.in_features, model.hidden.out_features) == (3 * 16, 5)
    assert model(images).shape == (2, 5)


def test_convolutions_are_scored_by_channel() -> None:
    torch.manual_seed(0)
    model = Net()
    images = torch.randn(2, 3, 4, 4)
    importance = Importance("magnitude", model, adapter="module")
    graph = tp.DependencyGraph().build_dependency(model, images)
    group = graph.get_pruning_group(model.second, tp.prune_conv_out_channels, list(range(6)))

    found = importance(group)

    own = model.second.weight.abs().mean((1, 2, 3))
    after = model.hidden.weight.abs().mean(0).view(6, 16).mean(1)
    assert torch.allclose(found, (own / own.mean() + after / after.mean()) / 2, rtol=1e-5)


def test_groups_without_scores_are_skipped() -> None:
    model = Net()
    images = torch.randn(1, 3, 4, 4)
    adapter = ModuleAdapter(model, exclude=["first", "second"])
    importance = Importance("magnitude", model, adapter=adapter)
    graph = tp.DependencyGraph().build_dependency(model, images)
    group = graph.get_pruning_group(model.first, tp.prune_conv_out_channels, list(range(8)))

    assert importance(group) is None
