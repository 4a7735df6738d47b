"""The trained models that are shipped: they work, and they tell pruning methods apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vlp_command import command

from benchmarks.demo import MODELS, SPARSITIES
from benchmarks.demo.__main__ import METHODS, command_of
from benchmarks.demo.build_data import build
from benchmarks.demo.measure import Subject
from benchmarks.demo.processors import FAMILIES
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
def compared(
    subject: Subject, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the demo says about the model."""
    out = tmp_path_factory.mktemp("compared") / "out"
    printed = command(
        *command_of(subject.source, data / "calibration", data / "test", out)[1:]
    ).stdout
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found | {"printed": printed}


def figures_of(compared: dict[str, Any], method: str, sparsity: float) -> dict[str, float]:
    """R@1 both ways."""
    (cell,) = (
        cell
        for cell in compared["cells"]
        if (cell["method"], float(cell["sparsity"])) == (method, sparsity)
    )
    return {name: cell["metrics"][name] for name in compared["score"]["mean_of"]}


def test_the_checkpoint_is_small_and_has_its_log(subject: Subject) -> None:
    assert (subject.source / "model.safetensors").stat().st_size <= SIXTEEN_MB
    assert (subject.source / "train.jsonl").stat().st_size > 0


def test_the_dense_model_works(subject: Subject, compared: dict[str, Any]) -> None:
    found = subject.measure()
    assert len(subject.pairs.facts) == 1000
    assert found.image_to_text > 80
    assert found.text_to_image > 80
    dense = compared["dense"]["metrics"]
    assert dense["image_to_text_r1"] == pytest.approx(found.image_to_text)
    assert dense["text_to_image_r1"] == pytest.approx(found.text_to_image)
    if subject.source.name == "blip":
        assert found.captions is not None
        assert found.captions > 75


def test_the_page_on_comparing_shows_what_is_printed(
    subject: Subject, compared: dict[str, Any]
) -> None:
    if subject.source.name == "blip":
        page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
        assert page.split("```text\n")[1].split("```")[0] in compared["printed"]


def test_random_pruning_at_63_percent_loses_at_least_half_of_the_recall(
    compared: dict[str, Any],
) -> None:
    for name, value in figures_of(compared, "random", 0.63).items():
        assert value <= compared["dense"]["metrics"][name] / 2


def test_the_best_and_the_worst_other_method_differ_by_ten_points(
    compared: dict[str, Any],
) -> None:
    spreads = []
    for sparsity in SPARSITIES:
        found = [figures_of(compared, name, sparsity) for name in METHODS if name != "random"]
        spreads += [max(f[way] for f in found) - min(f[way] for f in found) for way in found[0]]
    assert max(spreads) >= 10, spreads


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
