"""The demo from end to end, on untrained models and a handful of pairs."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from vlp_command import command

from benchmarks.demo import SPARSITIES, chat, owners
from benchmarks.demo.__main__ import FAMILIES, METHODS, main
from benchmarks.demo.build_data import build as build_data
from benchmarks.demo.families import build
from benchmarks.demo.measure import Subject
from benchmarks.demo.processors import FAMILIES as RETRIEVAL
from benchmarks.demo.processors import build_tokenizer, save_processors
from vlp_plugins.masks.masks import Masks
from vlp_plugins.pruning import prune

PAIRS, CALIBRATION = 12, 36


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for family in RETRIEVAL:
        build(family, build_tokenizer(family)).save_pretrained(folder / family)
        save_processors(family, folder / family)
    tokenizer = chat.build_tokenizer()
    chat.build(tokenizer).save_pretrained(folder / "chat")
    chat.build_processor(tokenizer).save_pretrained(folder / "chat")
    return folder


@pytest.fixture(scope="module")
def run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("run"), StringIO()
    words = ["--models-dir", str(models)]
    words += ["--pairs", str(PAIRS), "--calibration", str(CALIBRATION)]
    with chdir(folder), redirect_stdout(printed):
        assert main(words) == 0
    return folder / "demo-out", printed.getvalue()


@pytest.fixture(scope="module")
def finished(run: tuple[Path, str]) -> Path:
    """The folder of a run."""
    return run[0]


@pytest.fixture(scope="module")
def subject(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    data = tmp_path_factory.mktemp("data")
    build_data(data, calibration=CALIBRATION, downstream=0, test=PAIRS)
    return Subject.load(models / "blip", data)


def record_of(out: Path, family: str) -> dict:
    return json.loads((out / family / "compare.json").read_text())


def test_the_folder_holds_data_and_a_comparison_for_each_model(finished: Path) -> None:
    folders = sorted(path.name for path in finished.iterdir())
    assert folders == ["blip", "chat", "chat-data", "data", "xvlm"]
    assert record_of(finished, "chat")["task"] == "vqa"
    assert len(list((finished / "data/test").glob("*.png"))) == PAIRS
    assert len(list((finished / "data/calibration").glob("*.png"))) == CALIBRATION
    for family in FAMILIES:
        masks = {path.name for path in (finished / family / "masks").iterdir()}
        assert masks == {f"{m}-{s}.safetensors" for m in METHODS for s in SPARSITIES}


def test_every_file_of_masks_removes_exactly_what_it_says(finished: Path) -> None:
    for family in FAMILIES:
        for cell in record_of(finished, family)["cells"]:
            masks = Masks.load(finished / family / cell["masks"])
            assert masks.manifest.method == cell["method"]
            removed = int(float(cell["sparsity"]) * masks.total)
            # These round down in every modality, row or weight.
            loose = {"multiflow": 3, "wanda": 0.01 * masks.total, "alps": 0.01 * masks.total}
            allowed = loose.get(cell["method"], 1)
            assert 0 <= removed - masks.removed < allowed
            assert masks.removed == cell["removed"]


def test_masks_are_those_of_prune_and_figures_those_of_the_bench(
    finished: Path, subject: Subject
) -> None:
    made = prune(subject.model, subject.calibration, adapter=subject.adapter,
                 method="multiflow", sparsity=list(SPARSITIES))  # fmt: skip
    cells = [c for c in record_of(finished, "blip")["cells"] if c["method"] == "multiflow"]
    for masks, cell in zip(made, cells, strict=True):
        assert Masks.load(finished / "blip" / cell["masks"]) == masks
        before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
        found = subject.measure_under(masks)
        assert cell["metrics"]["image_to_text_r1"] == pytest.approx(found.image_to_text)
        assert cell["metrics"]["text_to_image_r1"] == pytest.approx(found.text_to_image)
        after = subject.model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_command_that_is_printed_is_the_one_that_is_run(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, printed = run
    monkeypatch.chdir(finished.parent)
    lines = re.findall(r"^\$ (vlp compare .*)$", printed, re.MULTILINE)
    assert len(lines) == len(FAMILIES)
    words = shlex.split(lines[0])
    assert words[words.index("--data") + 1] == "demo-out/data/calibration"
    words[words.index("--out") + 1] = str(tmp_path / "again")
    command(*words[1:])
    again = json.loads((tmp_path / "again" / "compare.json").read_text())
    assert again["methods"] == record_of(finished, "blip")["methods"], "the same in every run"


def test_a_folder_that_exists_is_left_alone(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["--models-dir", str(models), "--out", str(tmp_path)]) == 2
    assert "exists; remove it or give another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_missing_models_are_said_with_the_command_that_trains_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--models-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no trained model")
    assert "benchmarks.demo.train blip" in error
    assert not (tmp_path / "out").exists()


def test_owners_are_compared_on_the_same_statistics(subject: Subject, finished: Path) -> None:
    rows = owners.compare_owners(
        subject, finished / "data/calibration", samples=32, draw=0, sparsities=[0.75]
    )
    assert [row["owners"] for row in rows] == ["all", "first"]
    assert rows[1]["kept_by_both_or_either"] == 1 > rows[0]["kept_by_both_or_either"] > 0.3
    lines = owners.averages([*rows, *rows])
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["32", "75%", "all"]
