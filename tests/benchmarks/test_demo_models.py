"""The trained models that are shipped: they work, and they tell pruning methods apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.demo.build_data import build
from benchmarks.demo.compare import METHODS, SPARSITIES, Comparison, Subject, compare
from benchmarks.demo.measure import Figures
from benchmarks.demo.processors import FAMILIES
from benchmarks.demo.run import MODELS
from vlp_plugins.pruning import prune

pytestmark = pytest.mark.long

SIXTEEN_MB = 16_000_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    build(folder, calibration=512, downstream=0, test=1000)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, data: Path) -> Subject:
    return Subject.load(MODELS / request.param, data)


@pytest.fixture(scope="module")
def comparison(subject: Subject) -> Comparison:
    return compare(subject)


def test_the_checkpoint_is_small_and_has_its_log(subject: Subject) -> None:
    assert (subject.source / "model.safetensors").stat().st_size <= SIXTEEN_MB
    assert (subject.source / "train.jsonl").stat().st_size > 0


def test_the_dense_model_works(subject: Subject, comparison: Comparison) -> None:
    assert len(subject.pairs.facts) == 1000
    assert comparison.dense.image_to_text > 80
    assert comparison.dense.text_to_image > 80
    if comparison.name == "blip":
        assert comparison.dense.captions is not None
        assert comparison.dense.captions > 75


def test_random_pruning_at_63_percent_loses_at_least_half_of_the_recall(
    comparison: Comparison,
) -> None:
    pruned = comparison.of("random")[SPARSITIES.index(0.63)].figures
    assert pruned.image_to_text <= comparison.dense.image_to_text / 2
    assert pruned.text_to_image <= comparison.dense.text_to_image / 2


def test_the_best_and_the_worst_other_method_differ_by_ten_points(comparison: Comparison) -> None:
    def spread(figures: list[Figures]) -> float:
        by_figure = (
            [each.image_to_text for each in figures],
            [each.text_to_image for each in figures],
            [each.captions for each in figures if each.captions is not None],
        )
        return max(max(values) - min(values) for values in by_figure if values)

    others = [method for method in METHODS if method != "random"]
    spreads = {
        sparsity: spread([comparison.of(method)[i].figures for method in others])
        for i, sparsity in enumerate(SPARSITIES)
    }
    assert max(spreads.values()) >= 10, spreads


def test_global_and_modality_wise_magnitude_differ_by_five_points_in_a_modality(
    subject: Subject,
) -> None:
    shares = {}
    for allocation in ("global", "modality"):
        masks = prune(
            subject.model,
            adapter=subject.adapter,
            method="omp",
            allocation=allocation,
            sparsity=list(SPARSITIES),
        )
        shares[allocation] = [
            {name: count.sparsity for name, count in each.counts().by_modality.items()}
            for each in masks
        ]
    differences = [
        abs(one[name] - other[name])
        for one, other in zip(shares["global"], shares["modality"], strict=True)
        for name in one
    ]
    assert max(differences) >= 0.05, shares
