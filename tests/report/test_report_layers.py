"""layers.csv and the warnings about layers that collapse."""

from __future__ import annotations

import csv
import io
import re
from itertools import pairwise

import pytest
import torch
from toy_masks import Pretraining, ToyAdapter

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.report.layers import (
    LayerRow,
    collapse_warnings,
    heat_maps,
    kind_of,
    layer_rows,
    layer_table,
    to_csv,
)
from vlp_plugins.runtime.errors import SparsityError


@pytest.fixture
def weights() -> WeightMap:
    return WeightMap.of(Pretraining(), ToyAdapter())


def masks_of(weights: WeightMap, **kept: int) -> Masks:
    """Keeps the first elements of the named weights, and everything of the others."""
    dense = {}
    for name, weight in weights.items():
        count = kept.get(name.replace(".", "_"), weight.numel)
        dense[name] = (torch.arange(weight.numel) < count).view(weight.shape)
    return Masks.from_dense(dense, Manifest.for_weights(weights, method="test"))


def row(name: str, kept: int, total: int) -> LayerRow:
    return LayerRow(name, "text", 0, (total, 1), 1, (1 - kept / total,), (kept,))


def test_one_row_per_weight_in_the_adapters_order(weights: WeightMap) -> None:
    one, two = masks_of(weights), masks_of(weights, vision_ffn=3)
    text = to_csv(layer_rows(weights, [one, two]), ["0.1", "0.2"])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["name"] for row in rows] == list(weights)
    found = next(row for row in rows if row["name"] == "vision.ffn")
    total = weights["vision.ffn"].numel
    assert (found["kept_0.1"], found["kept_0.2"]) == (str(total), "3")
    assert float(found["sparsity_0.2"]) == pytest.approx(1 - 3 / total, abs=1e-6)
    assert found["shape"] == "x".join(map(str, weights["vision.ffn"].shape))


def test_empty_and_nearly_empty_layers_are_told_apart() -> None:
    rows = [row("a", 0, 1000), row("b", 9, 1000), row("c", 10, 1000), row("d", 500, 1000)]
    empty, thin = collapse_warnings(rows, ["0.9"])
    assert empty.startswith("sparsity 0.9: 1 of 4 weights removed entirely: a;")
    assert thin.startswith("sparsity 0.9: 1 of 4 weights all but removed (over 99%): b;")
    assert collapse_warnings(rows[2:], ["0.9"]) == []


def test_many_collapsed_layers_are_one_sentence() -> None:
    (warning,) = collapse_warnings([row(f"layer{i}", 0, 10) for i in range(8)], ["0.9"])
    assert "layer4 and 3 more;" in warning


QUICK = {
    "chita": {"lambda": 0.1},
    "chita++": {"lambda": 0.1, "rounds": 2},
    "itersnip": {"rounds": 2},
}


class Uneven(torch.nn.Module):
    """A layer that everything but a floor, or an even share, removes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = (6, 40, 40, 30, 8)
        layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
        layers[1].weight.data *= 1e-4
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("method", registry().method_names())
@pytest.mark.parametrize("sparsity", [0.9, 0.98, 0.995, 0.9995])
@pytest.mark.parametrize("variant", ["default", "published"])
def test_the_remedy_works(method: str, sparsity: float, variant: str) -> None:
    model = Uneven()
    adapter = ModuleAdapter(model, loss=lambda model, batch: model(batch).square().mean())
    rng = torch.Generator().manual_seed(1)
    batches = [torch.randn(6, 6, generator=rng) for _ in range(4)]
    options = {"sparsity": sparsity, "method": method, "adapter": adapter, **QUICK.get(method, {})}
    if method in ("lamp-tamt", "alps+", "refit") and variant == "published":
        return  # there is none
    masks = prune(model, batches, variant=variant, **options)
    rows = layer_rows(WeightMap.of(model, adapter), [masks])
    for warning in collapse_warnings(rows, [str(sparsity)], [masks]):
        remedy = warning.rpartition("; ")[2]
        if found := re.search(r"--floor ([\d.e-]+)", remedy):
            assert ("in the default variant" in remedy) == (variant == "published")
            alive = prune(model, batches, **options, floor=float(found[1]))
            assert all(bool(mask.any()) for mask in alive.values())
        elif "takes no floor" in remedy:
            with pytest.raises(SparsityError, match="floor"):
                prune(model, batches, variant=variant, **options, floor=0.001)
        else:
            assert "lower the sparsity" in remedy or "no floor leaves room" in remedy


def test_the_remedy_says_why_there_is_no_floor(weights: WeightMap) -> None:
    few = masks_of(weights, **{name.replace(".", "_"): 0 for name in weights})
    rows = layer_rows(weights, [few])
    assert "method 'test' takes no floor" in collapse_warnings(rows, ["0.9"], [few])[0]
    assert collapse_warnings(rows, ["0.9"])[0].endswith("no floor leaves room for all layers at "
                                                        "this sparsity: lower it")  # fmt: skip


def test_a_heat_map_has_a_row_per_depth_and_a_column_per_kind() -> None:
    def row(name: str, depth: int, kept: int) -> LayerRow:
        return LayerRow(name, name.partition(".")[0], depth, (10,), 1, (1 - kept / 10,), (kept,))

    rows = [
        row("vision.0.attention.query", 0, 10),
        row("vision.0.mlp.experts.0.fc1", 0, 2),
        row("vision.0.mlp.experts.1.fc1", 0, 4),
        row("vision.1.mlp.experts.0.fc1", 1, 0),
        row("text.0.attention.query", 0, 5),
    ]
    vision, text = heat_maps(rows, 0)
    assert (vision.title, text.title) == ("vision", "text")
    assert vision.columns == ["attention.query", "mlp.experts.fc1"]
    assert vision.rows == [("0", [0.0, pytest.approx(0.7)]), ("1", [None, 1.0])]
    assert text.rows == [("0", [0.5])]


def test_a_page_shows_so_many_weights_and_says_where_the_others_are() -> None:
    many = layer_table([row(f"w.{n}", 1, 2) for n in range(2001)], ["0.5"])
    assert len(many.rows) == 2000
    assert "The other 1 are in layers.csv." in many.note
    assert "layers.csv" not in layer_table([row("w", 1, 2)], ["0.5"]).note


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vision.3.attention.query", "attention.query"),
        ("model.visual.blocks.11.mlp.fc1", "mlp.fc1"),
        ("visual_projection", "visual_projection"),
        ("encoder.pooler.dense.weight", "pooler.dense"),
        ("layers.0.weight", "text"),
    ],
)
def test_the_kind_of_a_weight(name: str, kind: str) -> None:
    assert kind_of(LayerRow(name, "text", 0, (1,), 1, (0.0,), (1,))) == kind
