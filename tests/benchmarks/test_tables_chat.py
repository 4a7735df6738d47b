"""Tables chat and pretraining: cells on few samples, errors of figures, what their pages say."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.demo import chat as demo
from benchmarks.demo.conversations import Turn
from benchmarks.papers import chat_cells, pretraining
from benchmarks.papers.__main__ import main
from benchmarks.papers.catalogue import TABLES
from benchmarks.papers.chat import CHAT, Figure
from benchmarks.papers.chat_cells import PATTERN, SEEDS, Bench, Cell, answer_losses, cells
from vlp_plugins.methods.reconstruction.sparsegpt import SparseGpt
from vlp_plugins.runtime.errors import OutputError

WAYS = {way.name: way for way in (*chat_cells.WAYS, *chat_cells.AT_ONE)}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"POOL": 16, "QUESTIONS": 8, "CAPTIONS": 4}.items():
        monkeypatch.setattr(chat_cells, name, value)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


def options(out: Path, world: Path, **given: Any) -> argparse.Namespace:
    usual = {"seeds": None, "minutes": None, "list": False, "render": False, "tables": ["chat"]}
    return argparse.Namespace(cells=out / "cells", world=world, **{**usual, **given})


def small(name: str, sparsity: float | str = 0.5) -> Cell:
    return Cell(replace(WAYS[name], samples=8, batch_size=4), sparsity)


def test_all_cells_of_the_first_seed_come_first_and_none_is_there_twice() -> None:
    found = cells(SEEDS)
    assert len({cell.name for cell in found}) == len(found)
    seeds = [cell.seed for cell in found]
    assert seeds.index(2) == seeds.count(1)
    assert found[0].way is None
    names = [cell.name for cell in found]
    assert sum("/lamp-" in name for name in names) == 4, "it reads no data"
    assert not [name for name in names if "owl" in name and "2of4" in name]


def test_a_cell_prunes_and_measures_and_leaves_the_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench.of(world)
    before = {name: each.clone() for name, each in bench.model.state_dict().items()}
    dense, pruned = Cell(None), small("alps-blocks-atv", PATTERN)
    for cell in (dense, pruned):
        assert cell.content(tmp_path) is None
        cell.run(bench, tmp_path)
    assert all(bool((before[n] == each).all()) for n, each in bench.model.state_dict().items())
    contents = [cell.content(tmp_path) for cell in (dense, pruned)]
    assert [content and content["removed"] for content in contents] == [None, 0.5]
    for content in contents:
        assert content is not None
        assert {name: len(each) for name, each in content["test"].items()} == {
            "captions": 4, "answers": 8, "losses": 8,
        }  # fmt: skip
        assert set(content["dev"]) == set(CHAT.measures)
    tests = [content and content["test"] for content in contents]
    assert tests[0] != tests[1]
    monkeypatch.setattr(chat_cells, "VERSION", 2)
    with pytest.raises(OutputError, match="other settings"):
        dense.content(tmp_path)


def test_the_loss_of_an_answer_is_the_models_own(world: Path) -> None:
    bench = Bench.of(world)
    sample = bench.splits["test"].sample
    turns = [Turn("Describe the image.", caption) for caption in sample.captions]
    turns[0] = Turn("How many digits are there?", "two")
    found = answer_losses(bench.model, bench.tokenizer, sample, turns)
    for index in range(3):
        seen = demo.look(bench.model, sample.images[index : index + 1])
        alone = demo.answer_loss(bench.model, bench.tokenizer, seen, [[turns[index]]])
        assert found[index] == pytest.approx(alone.item(), abs=1e-3)


def test_seeds_calibrate_with_other_samples_half_of_them_questions(world: Path) -> None:
    bench, way = Bench.of(world), small("wanda-model").way
    assert way is not None
    first, again, other = (bench.batches(way, seed) for seed in (1, 1, 2))
    assert len(first) == 2
    images = [[batch["pixel_values"] for batch in each] for each in (first, again, other)]
    assert all(map(torch.equal, images[0], images[1]))
    assert not any(map(torch.equal, images[0], images[2]))
    assert first[0]["input_ids"].shape[1] > first[1]["input_ids"].shape[1], "captions are longer"


def test_errors_are_those_of_samples_and_of_seeds() -> None:
    values = {1: np.array([1.0, 0.0, 1.0, 1.0]), 2: np.array([0.0, 0.0, 1.0, 0.0])}
    found = Figure.of(values)
    assert found is not None
    means = [(values[1][i] + values[2][i]) / 2 for i in range(4)]
    mean = sum(means) / 4
    of_samples = (sum((each - mean) ** 2 for each in means) / 3 / 4) ** 0.5
    of_seeds = (((0.75 - mean) ** 2 + (0.25 - mean) ** 2) / 1 / 2) ** 0.5
    assert (found.mean, found.of_samples, found.of_seeds) == pytest.approx(
        (mean, of_samples, of_seeds)
    )
    assert not found.beyond
    assert found.text("answers") == f"50.0 ±{100 * of_samples:.1f} ±25.0"
    one = Figure.of({1: values[1] + np.arange(4)})
    assert one is not None
    assert one.of_seeds is None
    assert one.beyond
    assert Figure.of({}) is None


def _write(out: Path, cell: Cell, right: list[int], loss: float) -> None:
    test = {"captions": right[:2], "answers": right, "losses": [loss] * len(right)}
    dev = {"captions": 0.5, "answers": 0.5, "losses": loss}
    path = out / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**cell.identity(), "dev": dev, "test": test}))


def test_the_page_compares_scene_by_scene_and_chooses_by_the_development_split(
    tmp_path: Path,
) -> None:
    asked = cells((1, 2))
    for cell in asked:
        name = "" if cell.way is None else cell.way.name
        if cell.sparsity in (0.0, 0.7) and (cell.seed == 1 or name.startswith("wanda")):
            right = [1, 1, 1, 0] if "blocks" in name else [1, 0, 0, 0]
            _write(tmp_path, cell, right, 0.1 if name == "alps-blocks-atv" else 0.2)
    text = CHAT.page(asked, tmp_path)
    assert "cells are missing" in text
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()]
    found = {row[1]: row for row in rows if len(row) == 6}
    assert found["dense"][2:4] == ["50.0 ±50.0", "25.0 ±25.0"]
    assert found["wanda-blocks - wanda-model"][3:] == ["+50.0 ±28.9 ±0.0", "+0.000 ±0.000 ±0.000",
                                                       "2"]  # fmt: skip
    assert found["mean of these"][3] == "+50.0 ±28.9"
    assert "First is `alps-blocks-atv`" in text
    assert found["alps-blocks-atv - alps-model"][4] == "**-0.100 ±0.000**"
    sections, _ = text.split("## Chosen on the development split")
    shown = [line for line in sections.splitlines() if " - " in line and line.startswith("| ")]
    bold = sum(line.count("**") // 2 for line in shown)
    assert f"Of {3 * len(shown)} differences of two methods {bold} are bold." in text
    assert bold


def test_the_command_lists_resumes_and_stops(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat = replace(CHAT, cells=lambda _: [Cell(None), small("lamp")])
    assert chat.run(options(tmp_path, world, minutes=-1)) == 0
    assert "0 cells are there, 2 to run" in capsys.readouterr().out
    Cell(None).run(Bench.of(world), tmp_path / "cells")
    assert chat.run(options(tmp_path, world, list=True)) == 0
    assert capsys.readouterr().out.split() == ["done", "chat/dense", "missing",
                                               "chat/lamp-0.5-seed1"]  # fmt: skip
    assert chat.run(options(tmp_path, world)) == 0
    assert "1 cells are there, 1 to run" in capsys.readouterr().out
    assert chat.run(options(tmp_path, world, list=True, tables=[])) == 0
    assert capsys.readouterr().out.split() == ["chat", "2", "done", "0", "missing", "0", "stale"]
    assert chat.run(options(tmp_path, world, render=True)) == 0
    assert (tmp_path / "chat.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize("model", ["blip", pytest.param("xvlm", marks=pytest.mark.long)])
def test_a_pre_training_model_is_measured_pair_by_pair_and_left(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"POOL": 16, "PAIRS": 12, "LOSSES": 2, "LOSS_BATCH": 4}.items():
        monkeypatch.setattr(pretraining, name, value)
    bench = pretraining.Bench.of(tmp_path, model)
    before = {name: each.clone() for name, each in bench.model.state_dict().items()}
    ways = {way.name: replace(way, samples=8, batch_size=4) for way in pretraining.WAYS}
    dense = pretraining.Cell(None, model=model)
    pruned = pretraining.Cell(ways["wanda-blocks"], 0.9, model=model)
    refused = pretraining.Cell(ways["chita-model"], PATTERN, model=model)
    for cell in (dense, pruned, refused):
        cell.run(bench, tmp_path / "cells")
    assert all(bool((before[n] == each).all()) for n, each in bench.model.state_dict().items())
    found = [cell.content(tmp_path / "cells") for cell in (dense, pruned, refused)]
    for content in found[:2]:
        assert content is not None
        assert {name: len(each) for name, each in content["test"].items()} == {
            "recall": 12, "losses": 2,
        }  # fmt: skip
        assert set(content["test"]["recall"]) <= {0, 0.5, 1}
    # The loss of a batch does not depend on those before it, nor do features on the others.
    again = bench.splits["test"].measure(bench.model, bench.adapter)
    assert found[0] is not None
    assert again == found[0]["test"]
    assert found[1] is not None
    assert again != found[1]["test"]
    text = pretraining.TABLE.page((dense, pruned, refused), tmp_path / "cells")
    assert "- `chita-model` (2:4): method 'chita' " in text
    assert "cells are missing" not in text


def test_the_page_of_two_models_has_a_part_for_each(tmp_path: Path) -> None:
    asked = [c for c in pretraining.cells((1,)) if c.way is None or c.way.name.startswith("alps")]
    for cell in asked:
        loss = 0.5 if cell.model == "xvlm" and "blocks" in cell.name else 0.6
        test = {"recall": [1, 0.5], "losses": [loss, loss]}
        path = tmp_path / f"{cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        dev = {"recall": 0.75, "losses": loss}
        path.write_text(json.dumps({**cell.identity(), "dev": dev, "test": test}))
    blip, xvlm = pretraining.TABLE.page(asked, tmp_path).split("## X-VLM: the test split")
    assert "First is `alps-model`" in blip
    assert "First is `alps-blocks`" in xvlm
    assert "**-0.100 ±0.000**" not in blip
    assert xvlm.count("**-0.100 ±0.000**") == 12  # a row, a mean and the choice, of four each


def test_a_run_that_is_terminated_within_a_solver_writes_no_cell(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    table = replace(CHAT, cells=lambda _: [small("sparsegpt-model")])
    monkeypatch.setitem(TABLES, "chat", replace(TABLES["chat"], run=table.run))
    monkeypatch.setattr(SparseGpt, "solve", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    folder = tmp_path / "cells"
    argv = ["papers", "chat", "--cells", str(folder), "--world", str(world)]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        with pytest.raises(KeyboardInterrupt):
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not folder.exists()
