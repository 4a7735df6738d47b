"""The comparison with and without intrinsic dimensions: what it runs, keeps and concludes."""

import json

import pytest

from benchmarks.papers.id_gain.cells import Cell, Settings, seconds_left
from benchmarks.papers.id_gain.findings import (
    LEAST_GAIN,
    flat,
    gain,
    significant_gains,
    table,
    verdicts,
)
from benchmarks.papers.id_gain.ways import ARMS, BUDGETS, FACTOR, PLAIN, Way, ways
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.runtime.errors import OutputError


def cell(method, seed, recalls, seconds=10.0):
    """What a file says: R@1 by arm, both ways alike."""
    rows = [
        {
            "arm": arm,
            "sparsity": 0.75,
            "image_to_text": value + 1,
            "text_to_image": value - 1,
            "captions": None,
        }
        for arm, value in zip(ARMS, recalls, strict=True)
    ]
    return {"model": "blip", "seed": seed, "method": method, "seconds": seconds, "rows": rows}


CELLS = [
    cell("omp", 1, (90, 92, 80)),
    cell("omp", 2, (88, 91, 79)),
    cell("lamp", 1, (70, 71, 70.2)),
    cell("lamp", 2, (70, 69, 70.4)),
]


def test_a_gain_is_of_the_same_seed_and_helps_if_it_is_beyond_its_spread():
    rows = [row for row in flat(CELLS) if row["method"] == "omp"]

    found = gain(rows, FACTOR)
    assert (found.mean, found.spread) == (2.5, pytest.approx(0.5**0.5))
    assert found.verdict == "helps"
    assert gain(rows, BUDGETS).verdict == "hurts"
    assert gain(rows[:3], FACTOR).spread is None


def test_what_varies_more_than_it_gains_is_equal_and_so_is_what_few_pairs_decide():
    rows = [row for row in flat(CELLS) if row["method"] == "lamp"]
    assert gain(rows, FACTOR).verdict == "equal"
    assert gain(rows, BUDGETS).mean < LEAST_GAIN
    assert gain(rows, BUDGETS).verdict == "equal"


def test_one_line_per_model_and_sparsity_names_the_methods():
    (line,) = verdicts(flat(CELLS))
    assert line == (
        "blip at 75%, beyond the spread over seeds: id* helps 1 of 2 (omp), hurts 0; "
        "id budgets helps 0 of 2, hurts 1 (omp)"
    )
    assert len(table(flat(CELLS))) == 1 + 2


def test_what_a_t_test_finds_is_counted_and_named():
    """t is 5.2 of a gain of 3±1 over three seeds, 2.6 of 3±2; p is .05 at 4.3."""
    steady = [cell("omp", seed, (80, 81 + seed, 80.4)) for seed in (1, 2, 3)]
    varying = [cell("lamp", seed, (80, 80, 81 + 2 * seed)) for seed in (0, 1, 2)]

    factor, budgets = significant_gains(flat(steady + varying))

    assert factor.startswith("id*, of 2 cases beyond 0.5 points and p < 0.05")
    assert factor.endswith("helps 1 (omp), hurts 0")
    assert budgets.endswith("helps 0, hurts 0")


def test_every_registered_method_is_there_but_for_second_names():
    named = {way.method for way in ways()}
    assert named == set(registry().method_names()) - {"magnitude"}
    for way in ways():
        made = make_method(registry(), way.method, **way.parameters)
        assert made.name == way.method
    assert Way("omp").options(PLAIN) == {"method": "omp"}
    assert Way("omp").options(FACTOR) == {"method": "id*omp"}
    assert Way("omp").options(BUDGETS) == {"method": "omp", "allocation": "id"}


def test_a_cell_that_is_there_is_not_run_again_and_other_settings_are_noticed(tmp_path):
    settings = Settings()
    one = Cell("blip", 2, Way("chita++", {"rounds": 3}, 4))
    assert one.load(tmp_path, settings) is None
    content = {**cell("chita++", 2, (1, 2, 3)), **one.record(settings)}
    one.path(tmp_path).write_text(json.dumps(content))

    assert one.load(tmp_path, settings) == content
    with pytest.raises(OutputError, match="other settings"):
        one.load(tmp_path, Settings(pairs=100))
    with pytest.raises(OutputError, match="other settings"):
        Cell("blip", 2, Way("chita++", {"rounds": 4}, 4)).load(tmp_path, settings)


def test_the_time_left_is_that_of_cells_of_the_same_method():
    done = [cell("omp", 1, (1, 2, 3), 4.0), cell("chita", 1, (1, 2, 3), 100.0)]
    todo = [
        Cell("blip", 2, Way("omp")),
        Cell("blip", 2, Way("chita")),
        Cell("blip", 2, Way("snip")),
    ]
    assert seconds_left(done, todo) == 4.0 + 100.0 + 52.0
    assert seconds_left([], todo) is None
