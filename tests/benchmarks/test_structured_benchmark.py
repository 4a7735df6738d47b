"""The comparison of importances for structured pruning: what it runs, keeps and concludes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.papers.structured.__main__ import compare
from benchmarks.papers.structured.cells import Cell, Settings
from benchmarks.papers.structured.findings import rows_of, table, verdicts, worse_than_random
from benchmarks.papers.structured.tuning import Tuning
from benchmarks.papers.structured.ways import DENSE, RANDOM, WAYS, Way, ways
from vlp_plugins.runtime.errors import OutputError


def cell(importance: str, seed: int, cut: float, tuned: float) -> dict[str, Any]:
    """What a file says: R@1 both ways around a mean."""
    figures = [
        {"image_to_text": value + 1, "text_to_image": value - 1, "captions": None}
        for value in (cut, tuned)
    ]
    return {
        "model": "blip",
        "ratio": 0.5,
        "importance": importance,
        "seed": seed,
        "parameters": [100, 55],
        "cut": figures[0],
        "tuned": figures[1],
    }


CELLS = [
    cell("multiflow", 1, 70, 90),
    cell("multiflow", 2, 74, 92),
    cell("omp", 1, 60, 80),
    cell("omp", 2, 60, 80),
    cell(RANDOM, 1, 10, 84),
    cell(RANDOM, 2, 20, 86),
]


def test_rows_are_means_over_seeds_and_the_order_is_that_after_tuning() -> None:
    rows = rows_of(CELLS)

    assert rows[0]["cut"] == {"mean": 72, "spread": 2.8284}
    assert rows[0]["left"] == 0.55
    assert verdicts(rows) == ["blip at 50% after tuning: multiflow 91.0, random 85.0, omp 80.0"]
    assert worse_than_random(rows) == ["omp on blip at 50%"]
    assert len(table(rows)) == 4


def test_a_spread_is_rounded_once() -> None:
    """1.047 would be 1.05 with two digits, and 1.1 with one of those."""
    cells = [cell("omp", 1, 60, 80.0), cell("omp", 2, 60, 80 + 1.047 * 2**0.5)]

    assert table(rows_of(cells))[1].endswith("80.7 ±1.0")


def test_all_ways_are_there_and_any_method_may_be_named() -> None:
    assert [way.name for way in ways()] == [way.name for way in WAYS]
    assert {DENSE, RANDOM, "multiflow", "chita", "tp-taylor"} <= {way.name for way in WAYS}
    assert ways(["lamp"]) == [Way("lamp", "lamp")]


def test_a_cell_that_is_there_is_not_run_again_and_other_settings_are_noticed(
    tmp_path: Path,
) -> None:
    settings = Settings()
    one = Cell("blip", 2, 0.5, Way("omp", "omp"))
    content = {**cell("omp", 2, 60, 80), **one.record(settings)}
    one.path(tmp_path).write_text(json.dumps(content))

    assert one.load(tmp_path, settings) == content
    assert compare([one], settings, tmp_path) == [content]
    with pytest.raises(OutputError, match="other settings"):
        one.load(tmp_path, Settings(pairs=100))


def test_all_importances_are_tuned_with_the_same_pairs() -> None:
    tuning = Tuning(steps=3, pairs=4)
    first, second = (list(tuning.batches(1)) for _ in range(2))

    assert [texts for _, texts in first] == [texts for _, texts in second]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert [texts for _, texts in tuning.batches(2)] != [texts for _, texts in first]


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    rates = [Tuning(steps=60, rate=1.0).rate_at(step) for step in range(60)]

    assert rates[0] == 0.125
    assert max(rates) == pytest.approx(0.97, abs=0.01)
    assert rates[-1] < 0.001


@pytest.mark.parametrize("name", ["tp-taylor", "multiflow"])
def test_a_cell_cuts_tunes_and_measures_a_demo_model(name: str, tmp_path: Path) -> None:
    settings = Settings(samples=32, pool=32, pairs=32, tuning=Tuning(steps=1, pairs=4))
    (way,) = ways([name])

    (content,) = compare([Cell("xvlm", 1, 0.5, way)], settings, tmp_path)

    assert content["parameters"][1] < 0.6 * content["parameters"][0]
    assert 0 <= content["tuned"]["image_to_text"] <= 100
    assert Cell("xvlm", 1, 0.5, way).load(tmp_path, settings) == content
