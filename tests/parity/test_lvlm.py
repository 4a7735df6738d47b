"""Token selections and layer sparsities beside those that the published code gave."""

import json
from pathlib import Path

import pytest

from benchmarks.parity.lvlm import (
    TinyQwen,
    compare_das,
    compare_ecoflap,
    compare_lvlm,
    compare_owl,
    compare_rule,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def test_every_recorded_selection_and_budget_is_reproduced():
    lines = list(compare_lvlm(GOLDEN))

    assert [str(line) for line in lines if not line.ok] == []
    kinds = {line.what.split()[0] for line in lines}
    assert {"AMIA", "atv.0.6", "atv_alpha3.0.5", "rule", "DAS", "OWL", "ECoFLaP"} <= kinds
    walks = {line.what: line.detail for line in lines if line.what.startswith("walk")}
    names = ("wanda.0.6", "atv.0.6", "atv_alpha3.0.5", "tamp.0.6", "owl.0.7")
    assert walks == {f"walk {name}": "0 bits differ" for name in names}


@pytest.fixture(scope="module")
def recorded():
    return TinyQwen(GOLDEN / "lvlm")


@pytest.fixture
def sparsities():
    return json.loads((GOLDEN / "lvlm" / "sparsity" / "sparsities.json").read_text())


def wrong(lines):
    return [line.what for line in lines if not line.ok]


def test_what_differs_is_found(recorded, sparsities):
    """The comparisons themselves can fail."""
    runs = sparsities["runs"]
    runs["owl.0.7"]["outlier_percent"].reverse()
    next(iter(runs["das.0.5"]["densities"].values())).reverse()
    runs["ecoflap.0.5"]["importance"]["model.layers.0.mlp.up_proj.weight"] *= 1.01
    scores = runs["das_avg.0.6"]["group_scores"]
    scores[next(iter(scores))] *= 1.1

    assert wrong(compare_owl(recorded, runs)) == ["OWL owl.0.7"]
    assert wrong(compare_das(recorded, runs)) == ["DAS das.0.5"]
    assert "rule das_avg.0.6" in wrong(compare_rule(sparsities))
    few = {"ecoflap.0.5": runs["ecoflap.0.5"]}
    assert wrong(compare_ecoflap(recorded, few)) == ["ECoFLaP ecoflap.0.5"]
