"""Pages of the tables: what they say of figures, seeds, failures, and of what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.papers.candidates import ABLATED
from benchmarks.papers.catalogue import TABLES, Table, grid
from benchmarks.papers.cell import Cell
from benchmarks.papers.comparing import SEED_SPREAD, margin, pooled_spread, standard_error
from benchmarks.papers.findings import Entry, Found
from benchmarks.papers.layout import markdown, with_best
from benchmarks.papers.measures import TEXT
from benchmarks.papers.plots import style_of
from benchmarks.papers.rendering import render
from benchmarks.papers.tuning import LONGER, TUNINGS
from benchmarks.papers.views import lengths, ranked
from benchmarks.papers.views.compared import compared
from benchmarks.papers.views.dimensions import difference
from benchmarks.papers.views.modalities import collapsed
from benchmarks.papers.ways import WAYS

SPICE = "SPICE needs model files that are not there"


def retrieval(r1: float, features: float) -> dict[str, float]:
    """Metrics whose directions differ by two points around a mean."""
    return {
        "image_to_text_r1": r1 + 1,
        "text_to_image_r1": r1 - 1,
        "features_image_to_text_r1": features,
        "features_text_to_image_r1": features,
    }


def facts(sparsity: float, **by_modality: float) -> dict[str, Any]:
    """What a cell says of its masks."""
    return {"sparsity": sparsity, "by_modality": by_modality, "weights": 58, "nearly_emptied": 3}


def done(
    folder: Path,
    cell: Cell,
    metrics: Mapping[str, float],
    *,
    absent: Mapping[str, str] | None = None,
    pruned: Mapping[str, Any] | None = None,
) -> None:
    """Writes the file of a cell as if it had been run."""
    path = cell.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"metrics": metrics, "absent": absent or {}, "pruned": pruned}
    path.write_text(json.dumps({**cell.identity(), **content}))


def table(
    *names: str | None,
    tasks: Sequence[str] = ("retrieval",),
    sparsities: Sequence[float] = (0.63, 0.9),
) -> Table:
    """A table of BLIP pruned by ways of these names."""
    ways = [None if name is None else WAYS[name] for name in names]
    return Table(
        "small",
        "A small table",
        lambda seed: grid(ways, seed, models=["blip"], tasks=tasks, sparsities=sparsities),
    )


def rows_of(page: str, start: str) -> list[list[str]]:
    """The cells of the rows that begin so."""
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    texts = [[text.strip() for text in row] for row in rows]
    return [row for row in texts if row[0] == start]


def cell(way: str, sparsity: float = 0.63, seed: int = 1, task: str = "retrieval") -> Cell:
    return Cell("blip", task, WAYS[way], sparsity, seed)


def test_a_page_has_its_command_the_best_in_bold_and_says_what_is_missing(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    done(cells, Cell("blip", "retrieval", None, 0.0), retrieval(60, 61))
    done(cells, cell("omp"), retrieval(40, 41))
    done(cells, cell("multiflow"), retrieval(40.04, 39))

    page = render(table(None, "omp", "multiflow"), [1], cells, tmp_path)

    assert page == (tmp_path / "small.md").read_text()
    assert (tmp_path / "small.svg").read_text().startswith("<svg")
    assert "python -m benchmarks.papers small --render" in page
    assert "**2 of 5 cells are missing** (BLIP retrieval 2)" in page
    assert rows_of(page, "0%") == [["0%", "dense", "61.0", "59.0", "61.0", "61.0"]]
    assert rows_of(page, "63%") == [  # what rounds to the same is as good
        ["63%", "omp", "**41.0**", "**39.0**", "**41.0**", "**41.0**"],
        ["63%", "multiflow", "**41.0**", "**39.0**", "39.0", "39.0"],
    ]
    assert rows_of(page, "90%")[0] == ["90%", "omp", "-", "-", "-", "-"]


def test_captions_stand_beside_those_of_the_paper(tmp_path: Path) -> None:
    omp = cell("omp", 0.75, task="captioning")
    done(tmp_path, omp, {"bleu4": 30.0, "cider": 99.0, "meteor": 31.25})

    lines = compared(Found([omp], tmp_path)).lines

    page = "\n".join(lines[lines.index("## Captions beside the paper's (Table 9, MSCOCO)") :])
    beside = [row[1:] for row in rows_of(page, "75%")]
    assert ["omp", "31.2", "27.79±0.01", "20.96±0.03"] in beside
    assert ["multiflow", "", "28.12±0.04", "21.27±0.02"] in beside
    retrieved = compared(Found([cell("omp")], tmp_path)).lines
    assert not any("Captions" in line for line in retrieved)


def test_settings_are_those_of_the_cells(tmp_path: Path) -> None:
    page = render(table("omp", "snip"), [1, 2], tmp_path / "cells", tmp_path)

    assert "--seeds 1 2 --render" in page
    assert "120 steps of 32 at 0.0005, measured on 500 of test, 8 candidates re-ranked" in page
    assert "none (omp); 256 in batches of 8 (snip). Seeds: 1, 2 (a figure is" in page
    assert "guesses is 0.2% (1 of 500 images, each with its first caption)" in page
    assert standard_error(50, 500) == pytest.approx(2.236, abs=1e-3)


def test_seeds_become_a_mean_with_its_spread_and_a_missing_one_is_named(tmp_path: Path) -> None:
    for seed, value in ((1, 30.0), (2, 32.0)):
        done(tmp_path, cell("omp", seed=seed), retrieval(value, value))
    found = Found([cell("omp", seed=seed) for seed in (1, 2, 3)], tmp_path)

    entry = found.entry(TEXT, "blip", "omp", 0.63)

    assert (entry.mean, entry.text) == (32.0, "32.0±1.4 (2/3)")
    assert [each.seed for each in found.missing] == [3]


def test_lengths_of_fine_tuning_stand_side_by_side_with_what_is_left_of_dense(
    tmp_path: Path,
) -> None:
    for task, dense, r1, features in (("retrieval", 40, 20, 30), (LONGER, 60, 45, 54)):
        done(tmp_path, Cell("blip", task, None, 0.0), retrieval(dense, dense))
        done(tmp_path, cell("multiflow", 0.75, task=task), retrieval(r1, features))
    cells = [each for each in TABLES["longer"].cells(1) if each.model == "blip"]

    page = "\n".join(lengths(Found(cells, tmp_path)).lines)

    steps = [
        f"Average R@1, {kind}, {n} steps" for kind in ("features", "re-ranked") for n in (120, 480)
    ]
    assert rows_of(page, "Method") == [["Method", *steps]]
    assert rows_of(page, "dense") == [["dense", "40.0", "60.0", "40.0", "60.0"]]
    expected = ["multiflow", "30.0 (75%)", "54.0 (90%)", "20.0 (50%)", "45.0 (75%)"]
    assert rows_of(page, "multiflow") == [expected]
    assert rows_of(page, "tamt") == [["tamt", "-", "-", "-", "-"]]


def test_longer_fine_tuning_differs_in_its_steps_alone() -> None:
    for model in ("blip", "xvlm"):
        usual = TUNINGS[model, "retrieval"]
        assert TUNINGS[model, LONGER] == replace(usual, steps=4 * usual.steps)


def test_no_better_than_chance_is_an_error_by_features_and_never_the_best(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    done(cells, cell("omp"), retrieval(5, 0.4))
    done(cells, cell("multiflow"), retrieval(3, 0.5))

    page = render(table("omp", "multiflow"), [1], cells, tmp_path)

    assert rows_of(page, "63%") == [
        ["63%", "omp", "ERR", "ERR", "ERR", "ERR"],
        ["63%", "multiflow", "**4.0**", "**2.0**", "**0.5**", "**0.5**"],
    ]


def test_an_absent_metric_has_no_column_and_its_reason_stands_below_once(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    for way in ("omp", "multiflow"):
        scores = {"bleu4": 20.0, "cider": 60.0, "meteor": 25.0}
        done(cells, cell(way, task="captioning"), scores, absent={"spice": SPICE})

    page = render(table("omp", "multiflow", tasks=["captioning"]), [1], cells, tmp_path)

    assert rows_of(page, "Sparsity") == [["Sparsity", "Method", "BLEU@4", "CIDEr", "METEOR"]]
    assert page.count(f"SPICE is absent: {SPICE}.") == 1


def test_what_is_below_random_pruning_is_named(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    for way, value in (("random", 20), ("omp", 40), ("snip", 19)):
        done(cells, cell(way), retrieval(value, value))

    page = render(table("random", "omp", "snip"), [1], cells, tmp_path)

    assert "Below random pruning: Average R@1, features at 63%: snip." in page


def test_best_needs_something_to_compare_with() -> None:
    high, low = Entry(1, 1, {1: 30.0}), Entry(1, 1, {1: 20.0})
    failed, missing = Entry(1, 1, {1: 0.1}, failed=True), Entry(1, 0)

    assert with_best([low, high]) == ["20.0", "**30.0**"]
    assert with_best([high, missing, Entry()]) == ["30.0", "-", ""]
    assert with_best([failed, high]) == ["ERR", "**30.0**"]
    assert Entry(1, 1).text == "absent"


def test_markdown_keeps_bars_out_of_the_way() -> None:
    lines = markdown(["Method", "R@1"], [["omp", "1 | 2"]])

    assert lines == ["| Method |    R@1 |", "|:-------|-------:|", r"| omp    | 1 \| 2 |"]


def test_a_modality_collapses_below_a_tenth_of_its_fair_share() -> None:
    assert collapsed([facts(0.9, vision=0.992, text=0.8)]) == ["vision"]
    assert collapsed([facts(0.9, vision=0.989, text=0.8)]) == []
    assert collapsed([facts(0.9, vision=0.985), facts(0.9, vision=0.999)]) == ["vision"]


def test_modalities_stand_beside_the_recall(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    pruned = facts(0.63, vision=0.99, text=0.3)
    done(cells, Cell("blip", "retrieval", WAYS["snip"], 0.63), retrieval(12, 10), pruned=pruned)

    page = render(TABLES["modality"], [1], cells, tmp_path)

    assert "| 63%      | snip      |              99.0 |" in page
    assert rows_of(page, "63%")[1][2:] == ["99.0", "30.0", "3 of 58", "vision", "12.0", "10.0"]


def test_figures_stand_beside_those_of_the_paper_and_so_do_the_orders(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    for way, value in (("lamp", 30), ("multiflow", 35)):
        done(cells, Cell("xvlm", "retrieval", WAYS[way], 0.75), retrieval(value, value))

    page = render(TABLES["table4"], [1], cells, tmp_path)

    assert r"- \| 31.0 \| -" in page
    assert r"77.4 \| 73.9 \| 46.9" in page
    assert (
        "- Average R@1 at 75%: re-ranked multiflow 35.0, lamp 30.0; by features multiflow 35.0, "
        "lamp 30.0; in the paper multiflow 65.4, tamt 63.9, lamp 61.3, l2 59.5." in page
    )
    assert "80.7" in render(TABLES["table5"], [1], cells, tmp_path)  # quoted with a remark


def test_parts_of_the_score_have_names(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    done(cells, Cell("xvlm", "retrieval", WAYS["multiflow-nodes"], 0.9), retrieval(3, 2))

    page = render(TABLES["table8"], [1], cells, tmp_path)

    (blip, xvlm) = [row for row in rows_of(page, "90%") if row[1] == "nodes only"]
    assert blip[2:] == ["-"] * 4
    assert xvlm[2:] == ["4.0", "2.0", "2.0", "2.0", "10.5±0.3", "7.1±0.1"]


def test_a_difference_is_of_the_same_seeds_and_equal_within_two_errors() -> None:
    plain = Entry(2, 2, {1: 20.0, 2: 22.0})

    assert difference(plain, Entry(2, 1, {1: 24.0}), 500) == "+4.0 ="
    assert difference(plain, Entry(2, 2, {1: 36.0, 2: 34.0}), 500) == "+14.0"
    assert difference(plain, Entry(2, 0), 500) == "-"


def test_a_margin_has_the_error_of_queries_and_of_seeds() -> None:
    one, two = Entry(1, 1, {1: 50.0}), Entry(1, 1, {1: 56.0})

    found = margin(one, two, 500)

    assert found is not None
    assert found.points == 6.0
    assert found.error == pytest.approx((2 * 2.23**2 + 2 * SEED_SPREAD**2) ** 0.5, abs=0.02)
    assert not found.beyond
    assert margin(one, Entry(1, 1, {2: 56.0}), 500) is None
    assert pooled_spread([Entry(2, 2, {1: 1.0, 2: 3.0}), Entry(3, 3, {1: 5.0, 2: 5.0, 3: 5.0}),
                          one]) == pytest.approx((2 / 3) ** 0.5)  # fmt: skip


def test_what_is_ahead_of_everything_published_is_named_with_its_margins(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    values = {"lamp": (20, 24), "l2": (26, 21), "lamp-tamt": (30, 30), "tamt-modality": (35, 22)}
    ways = {way.name: way for way in (*WAYS.values(), *ABLATED)}
    for way, by_model in values.items():
        for model, value in zip(("blip", "xvlm"), by_model, strict=True):
            done(cells, Cell(model, "retrieval", ways[way], 0.9), retrieval(50, value))
    every = [Cell(m, "retrieval", ways[w], 0.9) for w in values for m in ("blip", "xvlm")]

    page = render(Table("small", "Small", lambda _: every, ranked), None, cells, tmp_path)

    assert (
        "- 90%: BLIP l2 26.0, X-VLM lamp 24.0. Ahead of each: **lamp-tamt** by +4.0±4.0 and "
        "+6.0±4.0." in page
    )
    assert rows_of(page, "*lamp*")[0][1:] == ["20.0", "24.0", "22.0"]
    assert page.count("Ahead of each: none") == 1  # re-ranked, all are the same


def test_a_way_that_lacks_a_seed_is_neither_best_nor_ahead(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    for way, seed, value in (("lamp", 1, 20), ("lamp", 2, 22), ("omp", 1, 40)):
        done(cells, Cell("blip", "retrieval", WAYS[way], 0.9, seed), retrieval(value, value))
    every = [Cell("blip", "retrieval", WAYS[w], 0.9, s) for w in ("lamp", "omp") for s in (1, 2)]

    page = render(Table("small", "Small", lambda _: every, ranked), None, cells, tmp_path)

    assert rows_of(page, "*lamp*")[0] == ["*lamp*", "**21.0±1.4**", "21.0"]
    assert rows_of(page, "*omp*")[0] == ["*omp*", "40.0 (1/2)", ""]
    assert "- 90%: BLIP lamp 21.0±1.4." in page


def test_numbers_of_pairs_are_columns_and_what_was_never_asked_is_empty(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    done(cells, cell("chita-64-pairs", 0.75), retrieval(25, 20))

    page = render(TABLES["data"], [1], cells, tmp_path)

    assert rows_of(page, "chita")[0] == ["chita", "-", "25.0", "-", "-", ""]


def test_splits_are_never_mixed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dev, test"):
        Found([cell("omp"), Cell("blip", "retrieval", None, 0.0, 1, "dev")], tmp_path)


def test_a_method_keeps_its_colour_and_methods_differ() -> None:
    plain = [style_of(name) for name in ("random", "snip", "itersnip", "omp", "lamp", "multiflow")]

    assert len(set(plain)) == len(plain)
    assert style_of("id-factor-omp") == style_of("id-budgets-omp") == style_of("omp")
    assert style_of("multiflow-3000-pairs") == style_of("multiflow")
    assert style_of("outsider") == style_of("outsider")
