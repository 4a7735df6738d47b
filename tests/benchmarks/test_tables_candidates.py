"""Compositions of the search: exact counts, supports of their bases, values that fit the model."""

from pathlib import Path

import pytest
import torch

from benchmarks.papers.candidates import (
    AS_PUBLISHED,
    CALLED,
    CANDIDATES,
    FINALISTS,
    FOUND,
    better_cells,
    final_cells,
    search_cells,
)
from benchmarks.papers.compositions import COMPOSITIONS
from benchmarks.papers.compositions.refit import pieces_of
from benchmarks.papers.pruning import target_of
from benchmarks.papers.ways import MORE, PAPER, Way
from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"
SPARSITY = 0.75


@pytest.fixture(scope="module")
def model():
    return model_from_golden(GOLDEN)


@pytest.fixture(scope="module")
def weights(model):
    return WeightMap.of(model, registry().adapter_for(model))


@pytest.fixture(scope="module")
def batches():
    return batches_from_golden(GOLDEN)[:4]


MADE = {
    "within": {"score": "magnitude", "by": "lamp", "modality": False},
    "refit": {"base": "lamp"},
    "joint": {"steps": 3},
    "staged": {"first": "chita", "second": "tamt", "steps": 2},
    "tamt-from-lamp": {"steps": 2},
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_they_remove_what_is_asked_for_and_leave_the_model_alone(model, weights, batches, name):
    before = {key: value.clone() for key, value in model.state_dict().items()}

    masks = prune(model, batches, method=COMPOSITIONS[name](**MADE[name]), sparsity=SPARSITY)

    assert masks.removed == int(SPARSITY * weights.numel)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for key, values in (masks.new_values or {}).items():
        assert bool(values.isfinite().all()), key


def test_refitting_keeps_the_support_and_changes_what_stays(model, weights, batches):
    lamp = prune(model, sparsity=SPARSITY, method="lamp")

    masks = prune(model, batches, method=COMPOSITIONS["refit"]("lamp"), sparsity=SPARSITY)

    assert all(torch.equal(masks[name], lamp[name]) for name in weights)
    fresh = model_from_golden(GOLDEN)
    masks.apply(fresh)
    changed = 0
    for name, weight in WeightMap.of(fresh, registry().adapter_for(fresh)).items():
        now, dense = weight.parameter, weights[name].parameter
        assert not bool((now * ~lamp[name].view(now.shape)).any())
        changed += int(((now - dense).abs() > 0)[lamp[name].view(now.shape)].sum())
    assert changed > 0


def test_an_enormous_ridge_leaves_the_values_as_they_were(model, weights, batches):
    refit = COMPOSITIONS["refit"]("lamp", ridge=1e12)

    masks = prune(model, batches, method=refit, sparsity=SPARSITY)

    fresh = model_from_golden(GOLDEN)
    masks.apply(fresh)
    for name, weight in WeightMap.of(fresh, registry().adapter_for(fresh)).items():
        dense = weights[name].parameter * masks[name].view(weight.shape)
        torch.testing.assert_close(weight.parameter, dense, rtol=1e-5, atol=1e-7)


def test_a_batch_falls_into_pieces_in_order(batches):
    pieces = list(pieces_of(batches[0], 2))

    ids = torch.cat([piece["input_ids"] for piece in pieces])
    assert torch.equal(ids, batches[0]["input_ids"])
    assert {len(piece["pixel_values"]) for piece in pieces[:-1]} <= {2}


def test_a_tilt_keeps_the_sparsity_of_the_whole_model(weights):
    way = Way("tilted", "omp", tilt={"text": 1.5})

    found = target_of(weights, way, 0.9)

    assert found["text"] == pytest.approx(0.85)
    sizes = {m: sum(w.numel for w in each) for m, each in weights.by_modality().items()}
    removed = sum(found[name] * size for name, size in sizes.items())
    assert removed == pytest.approx(0.9 * weights.numel)
    assert target_of(weights, Way("plain", "omp"), 0.9) == 0.9
    assert target_of(weights, Way("over", "omp", inverted=True), 0.9) == pytest.approx(0.1)


def test_the_search_has_at_least_twenty_compositions_and_reads_no_test():
    names = [way.name for way in CANDIDATES]

    assert len(names) == len(set(names)) >= 20
    assert not set(names) & AS_PUBLISHED
    assert set(FINALISTS) | set(CALLED) <= set(names)
    assert {cell.split for cell in (*search_cells(1), *final_cells(1))} == {"dev"}
    assert {cell.split for cell in better_cells(1)} == {"test"}


def test_what_was_found_is_measured_beside_everything_published_and_its_parts():
    names = [cell.way.name for cell in better_cells(1)]

    published = {way.name for way in (*PAPER, *MORE)} - {"random"}
    assert published | {"lamp-tamt", "tamt-modality", "tamt-from-lamp"} <= set(names)
    assert len(names) == 4 * len(set(names))  # two models, two sparsities


def test_candidates_that_were_registered_are_the_same_as_the_methods(model):
    batches = batches_from_golden(GOLDEN)  # dimensions need 20 samples
    found = {way.name: way for way in (*CANDIDATES, *FOUND)}
    for candidate, name in CALLED.items():
        ways = (found[candidate], found[name])
        made = [COMPOSITIONS.get(w.method) for w in ways]
        masks = [
            prune(
                model,
                batches,
                method=build(steps=3) if build else way.method,
                sparsity=SPARSITY,
                **({} if build else {"steps": 3}),
                **way.options,
            )
            for build, way in zip(made, ways, strict=True)
        ]
        assert all(torch.equal(masks[0][each], masks[1][each]) for each in masks[0])
