"""The demo from end to end, on untrained models and a handful of pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.demo import owners
from benchmarks.demo.__main__ import main
from benchmarks.demo.build_data import build as build_data
from benchmarks.demo.compare import METHODS, Subject, compare, restoring
from benchmarks.demo.families import build
from benchmarks.demo.own_files import LISTING, listed, replacing
from benchmarks.demo.processors import FAMILIES, build_tokenizer, save_processors
from benchmarks.demo.run import Settings, run
from benchmarks.demo.table import recipe_of, results_table, text_of
from vlp_plugins.jobs.prune import run as run_recipe
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import OutputError, UnsupportedError

PAIRS, CALIBRATION, SPARSITIES = 12, 36, (0.5, 0.9)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for family in FAMILIES:
        build(family, build_tokenizer(family)).save_pretrained(folder / family)
        save_processors(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def settings(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    out = tmp_path_factory.mktemp("run") / "demo-out"
    return Settings(models, out, PAIRS, CALIBRATION, METHODS, SPARSITIES)


@pytest.fixture(scope="module")
def finished(settings: Settings) -> tuple[Path, list[str]]:
    said: list[str] = []
    return run(settings, tell=said.append), said


@pytest.fixture(scope="module")
def subject(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    data = tmp_path_factory.mktemp("data")
    build_data(data, calibration=CALIBRATION, downstream=0, test=PAIRS)
    return Subject.load(models / "blip", data)


def test_the_folder_holds_data_masks_figures_and_report(
    settings: Settings, finished: tuple[Path, list[str]]
) -> None:
    out = settings.out
    assert finished[0] == out / "report.html"
    assert sorted(path.name for path in out.iterdir()) == [
        LISTING, "blip", "data", "report.html", "results.json", "xvlm"
    ]  # fmt: skip
    assert len(list((out / "data/test").glob("*.png"))) == PAIRS
    assert len(list((out / "data/calibration").glob("*.png"))) == CALIBRATION
    for family in FAMILIES:
        assert sorted(path.name for path in (out / family).iterdir()) == sorted(
            f"{method}-{sparsity}.safetensors" for method in METHODS for sparsity in SPARSITIES
        )


def test_every_file_of_masks_removes_exactly_what_it_says(
    settings: Settings, finished: tuple[Path, list[str]]
) -> None:
    results = json.loads((settings.out / "results.json").read_text())["figures"]
    for family, found in results["models"].items():
        assert len(found["pruned"]) == len(METHODS) * len(SPARSITIES)
        for row in found["pruned"]:
            file = settings.out / family / f"{row['method']}-{row['sparsity']}.safetensors"
            masks = Masks.load(file)
            assert masks.manifest.method == row["method"]
            assert masks.removed == row["removed"]
            if row["method"] == "multiflow":  # rounds down in every modality
                assert 0 <= int(row["sparsity"] * masks.total) - masks.removed < 3
            else:
                assert masks.removed == int(row["sparsity"] * masks.total)


def test_tables_have_a_row_per_method_and_sparsity_and_captions_for_blip_only(
    settings: Settings, finished: tuple[Path, list[str]]
) -> None:
    tables = [text for text in finished[1] if "unseen pairs" in text]
    assert [text.split()[0] for text in tables] == ["BlipForPretraining", "XvlmForPretraining"]
    for text, modalities in zip(tables, (["vision", "text"], ["vision", "text", "fusion"]),
                                strict=True):  # fmt: skip
        lines = [line.split() for line in text.splitlines() if line.strip()]
        assert lines[1][-len(modalities) :] == modalities
        rows = {(line[0], line[1]): line for line in lines[2:]}
        assert set(rows) == {
            ("dense", "-"), *((f"{s:.0%}", method) for s in SPARSITIES for method in METHODS)
        }  # fmt: skip
        assert rows["90%", "multiflow"][-1] == "90.0%"
        assert (rows["dense", "-"][4] == "-") == ("fusion" in modalities)


def test_the_report_is_one_page_with_a_section_per_model_and_method(
    finished: tuple[Path, list[str]],
) -> None:
    page = finished[0].read_text()
    for family in FAMILIES:
        for method in METHODS:
            assert f"<summary>{method} on {family}: sparsity per layer" in page
    assert page.count('role="img"') == len(FAMILIES)
    assert not any(mark in page for mark in ("<link", 'src="', "url("))


def test_the_reports_command_makes_the_same_masks(
    settings: Settings, finished: tuple[Path, list[str]], subject: Subject, tmp_path: Path
) -> None:
    made = [
        Masks.load(settings.out / "blip" / f"multiflow-{sparsity}.safetensors")
        for sparsity in SPARSITIES
    ]
    comparison = compare(subject, ["multiflow"], SPARSITIES)
    recipe = recipe_of(comparison, comparison.of("multiflow"), settings.out / "data/calibration")
    result = run_recipe(replace(recipe, out=str(tmp_path / "cli")))
    assert list(result.masks.values()) == made
    assert "--method multiflow --sparsity 0.5 0.9 --data" in finished[0].read_text()


def test_a_model_has_its_weights_back_after_every_measurement(subject: Subject) -> None:
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    outcome = compare(subject, ["random"], [0.9]).outcomes[0]
    after = subject.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with restoring(WeightMap.of(subject.model, subject.adapter)):
        outcome.masks.apply(subject.model, subject.adapter)
        assert not outcome.masks.verify(subject.model, subject.adapter)
        assert subject.measure() == outcome.figures
    assert outcome.masks.verify(subject.model, subject.adapter)


def test_a_table_as_text_is_aligned(subject: Subject) -> None:
    text = text_of(results_table(compare(subject, ["omp", "lamp"], [0.75]), PAIRS))
    rows = [line for line in text.splitlines()[1:] if line.strip()]
    assert len(rows) == 4
    assert len({len(row) for row in rows}) == 1


def test_a_run_replaces_its_own_files_and_no_others(settings: Settings, tmp_path: Path) -> None:
    small = replace(settings, out=tmp_path / "out", methods=["l2", "omp"], pairs=2)
    run(small, tell=lambda line: None)
    (small.out / "notes.txt").write_text("mine")
    (small.out / "blip" / "omp-0.5.safetensors").unlink()
    run(replace(small, methods=["omp"]), tell=lambda line: None)
    assert (small.out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (small.out / "blip").iterdir()) == [
        "omp-0.5.safetensors",
        "omp-0.9.safetensors",
    ]


def test_somebody_elses_file_under_our_names_stops_the_run_before_it_starts(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "blip").mkdir()
    (tmp_path / "blip" / "thesis.txt").write_text("mine")
    said: list[str] = []
    with pytest.raises(OutputError, match=r"thesis\.txt was not made by an earlier run"):
        run(replace(settings, out=tmp_path), tell=said.append)
    assert not said
    assert (tmp_path / "blip" / "thesis.txt").read_text() == "mine"


def test_a_run_that_fails_leaves_the_earlier_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replacing(out, ["a", "b"]) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "one").write_text("1")
        (folder / "b").write_text("2")
    assert listed(out) == {"a/one", "b"}

    def fail() -> None:
        with replacing(out, ["a", "b"]) as folder:
            (folder / "b").write_text("3")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (out / "b").read_text() == "2"
    assert sorted(path.name for path in out.iterdir()) == [LISTING, "a", "b"]
    with replacing(out, ["a", "b"]) as folder:
        (folder / "b").write_text("3")
    assert listed(out) == {"b"}
    assert sorted(path.name for path in out.iterdir()) == [LISTING, "b"]


@pytest.mark.parametrize("text", ["{", "[]", '{"made_by": "x", "schema": 1, "files": []}'])
def test_a_damaged_list_is_an_error_and_nothing_is_removed(text: str, tmp_path: Path) -> None:
    (tmp_path / LISTING).write_text(text)
    with (
        pytest.raises(OutputError, match="damaged"),
        replacing(tmp_path, ["a"]),
    ):
        pass
    assert (tmp_path / LISTING).read_text() == text


def test_a_list_never_reaches_outside_of_the_folder(tmp_path: Path) -> None:
    content = {"made_by": "benchmarks.demo", "schema": 1, "files": ["../precious"]}
    (tmp_path / LISTING).write_text(json.dumps(content))
    with pytest.raises(OutputError, match="outside"):
        listed(tmp_path)


def test_missing_models_are_said_with_the_command_that_trains_them(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"benchmarks\.demo\.train blip"):
        run(replace(settings, models=tmp_path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.argv", ["demo", "--models-dir", str(tmp_path)])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: there is no trained model")


def test_owners_are_compared_on_the_same_statistics(
    subject: Subject, settings: Settings, finished: tuple[Path, list[str]]
) -> None:
    rows = owners.compare_owners(
        subject, settings.out / "data/calibration", samples=32, draw=0, sparsities=[0.75]
    )
    assert [row["owners"] for row in rows] == ["all", "first"]
    assert rows[1]["kept_by_both_or_either"] == 1 > rows[0]["kept_by_both_or_either"] > 0.3
    lines = owners.averages([*rows, *rows])
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["32", "75%", "all"]
