"""The ViT of Table 6: its pruning images, its loss, masks that fit the classifier, the table."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.papers.catalogue import TABLES
from benchmarks.papers.cell import Cell
from benchmarks.papers.downstream.classes import SETS
from benchmarks.papers.downstream.vit import MODEL
from benchmarks.papers.findings import Found
from benchmarks.papers.pruning import calibration, load
from benchmarks.papers.tuning import TUNINGS, task_of
from benchmarks.papers.views.classification import PUBLISHED, classification
from benchmarks.papers.vit import (
    MatchingAdapter,
    RecoveryAdapter,
    class_states,
    fitted_head,
    images,
)
from benchmarks.papers.ways import VIT_WAYS, Way
from benchmarks.papers.world import World
from vlp_plugins.jobs.preparation import Loaded
from vlp_plugins.pruning import prune
from vlp_plugins.tasks.finetuning.finetune import downstream

WORLD = World(Path("nowhere"))  # the ViT needs none of it
PRETRAINED_LOSS = 0.035  # the last line of its train.jsonl


@pytest.fixture(scope="module")
def vit() -> Loaded:
    return load(WORLD, "vit")


@pytest.fixture(scope="module")
def recovering(vit: Loaded) -> RecoveryAdapter:
    return RecoveryAdapter.fitted(vit.adapter, vit.model, images(1024, 128, 1))


def test_fewer_images_are_the_first_ones_of_more() -> None:
    few, many = images(130, 50, 1), images(300, 50, 1)
    assert [len(batch["pixel_values"]) for batch in few] == [50, 50, 30]
    for one, other in zip(few[:2], many[:2], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(few[0]["scans"], images(130, 50, 2)[0]["scans"])


@pytest.mark.parametrize("way", VIT_WAYS[2:], ids=lambda way: way.name)
def test_a_way_sees_its_number_of_images(vit: Loaded, way: Way) -> None:
    batches = calibration(WORLD, vit, way, seed=1)
    assert sum(len(batch["pixel_values"]) for batch in batches) == way.samples


def test_the_fit_finds_the_layer_that_made_the_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(8, 3)
    features = torch.randn(400, 8, generator=generator) + 5
    with torch.no_grad():
        found = fitted_head(features, layer(features), ridge=0.0)
    torch.testing.assert_close(found.weight, layer.weight)
    torch.testing.assert_close(found.bias, layer.bias, rtol=1e-4, atol=1e-4)


def test_ridge_shrinks_weights_and_never_the_mean() -> None:
    features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    wanted = features[:, :2] + 7
    plain, shrunk = fitted_head(features, wanted), fitted_head(features, wanted, ridge=1.0)
    assert shrunk.weight.norm() < 0.8 * plain.weight.norm()
    with torch.no_grad():
        torch.testing.assert_close(shrunk(features).mean(0), wanted.mean(0))


def test_matching_is_none_for_the_dense_model_and_one_for_the_mean(vit: Loaded) -> None:
    (batch,) = images(32, 32, 1)
    matching = MatchingAdapter(vit.adapter, vit.model)
    pruned = deepcopy(vit.model)
    prune(pruned, adapter=matching, sparsity=0.5, method="omp").apply(pruned)

    assert float(matching.losses(vit.model, batch)["matching"].detach()) == 0
    some = matching.losses(pruned, batch)["matching"]
    some.backward()

    assert 0.001 < float(some.detach()) < 1
    assert all(value.grad is None for value in matching.dense.parameters())
    states = vit.model(pixel_values=batch["pixel_values"]).last_hidden_state

    class Mean(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=states.mean(0).expand_as(states))

    assert float(matching.losses(Mean(), batch)["matching"].detach()) == pytest.approx(1)


def test_the_found_head_is_as_good_as_the_lost_one(
    vit: Loaded, recovering: RecoveryAdapter
) -> None:
    with torch.no_grad():
        losses = [recovering.losses(vit.model, batch) for batch in images(256, 128, 9)]
    mean = sum(float(loss["recovery"]) for loss in losses) / len(losses)
    assert mean == pytest.approx(PRETRAINED_LOSS, rel=0.1)


def test_the_gradient_reaches_every_weight_and_not_the_head(
    vit: Loaded, recovering: RecoveryAdapter
) -> None:
    (batch,) = images(16, 16, 3)
    weights = [weight.parameter for weight in vit.weights.values()]
    loss = recovering.losses(vit.model, batch)["recovery"]
    gradients = torch.autograd.grad(loss, weights)
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients)
    assert not recovering.head.weight.requires_grad


def test_features_are_those_of_pretraining(vit: Loaded) -> None:
    (batch,) = images(4, 4, 3)
    with torch.no_grad():
        states = vit.model(pixel_values=batch["pixel_values"]).last_hidden_state
        assert torch.equal(class_states(vit.model, batch), states[:, 0])


@pytest.mark.parametrize("method", ["tamt", "multiflow"])
def test_masks_fit_the_classifier(vit: Loaded, recovering: RecoveryAdapter, method: str) -> None:
    masks = prune(
        vit.model, images(32, 8, 1), adapter=recovering, sparsity=0.75, method=method, seed=1
    )
    assert set(masks) == set(vit.weights)
    model = downstream(vit.model, vit.adapter, "classification", classes=10)
    masks.apply(model, vit.adapter)
    zeros = sum(
        int((parameter == 0).sum())
        for path, parameter in model.named_parameters()
        if path.startswith("vit.layers") and parameter.ndim > 1
    )
    assert zeros == masks.counts().all.removed


@pytest.mark.parametrize(("split", "folder"), [("dev", "digits-dev"), ("test", "digits")])
def test_development_lies_in_a_folder_of_its_own(
    vit: Loaded, tmp_path: Path, split: str, folder: str
) -> None:
    place = World(tmp_path).downstream / folder / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    (place / "test_batch.bin").write_bytes(bytes(3 * 3073))
    task = task_of(World(tmp_path), vit, TUNINGS["vit", "digits"], split)
    assert task.settings() == {"images": 3}


def test_table_has_every_way_on_every_set() -> None:
    cells = TABLES["table6"].cells(1)
    assert len({cell.name for cell in cells}) == len(SETS) * (1 + 3 * len(VIT_WAYS))
    assert {cell.model for cell in cells} == {"vit"}
    assert WORLD.model("vit") == str(MODEL)


def test_figures_stand_beside_those_of_the_paper(tmp_path: Path) -> None:
    cells = TABLES["table6"].cells(1)
    _write(tmp_path, next(cell for cell in cells if cell.way is None), 95.0)
    for number, way in enumerate(VIT_WAYS):
        _write(tmp_path, Cell("vit", "digits", way, 0.63), 80.0 + number)
    found = Found(cells, tmp_path)
    text = "\n".join(classification(found).lines)
    assert "| dense " in text
    assert "95.0" in text
    assert r"**83.0** \| - \| -" in text
    assert r"98.1 \| 96.3 \| 67.4" in text
    assert set(PUBLISHED) - {"multiflow-64000-images"} < {"dense", *found.ways}


def _write(folder: Path, cell: Cell, top1: float) -> None:
    path = cell.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**cell.identity(), "metrics": {"top1": top1}}), encoding="utf-8")
