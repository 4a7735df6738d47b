"""Methods that run the model as they go: their folder of work, options, plan and report."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import doubling
import pytest
import torch
from vlp_command import Command

from vlp_adapters.xvlm import XvlmForPretraining
from vlp_plugins.jobs.prune import run
from vlp_plugins.jobs.recipes import DataRecipe, Recipe
from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.errors import RecipeError


@pytest.fixture(autouse=True)
def method():
    with doubling.registered():
        yield


@pytest.fixture
def words(xvlm: Path, photos: Path) -> list[object]:
    return [
        *("--model", xvlm, "--method", "doubling", "--sparsity", "0.5", "0.75"),
        *("--data", photos, "--batch-size", "3", "--device", "cpu"),
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_writes_masks_with_new_weights_and_no_statistics(vlp: Command, words, tmp_path):
    out = tmp_path / "out"
    result = vlp("prune", *words, "--out", out, "--save-model")

    assert names(tmp_path) == ["out"]
    assert names(out) == [
        "layers.csv", "masks-0.5.safetensors", "masks-0.75.safetensors", "model-0.5",
        "model-0.75", "recipe.yaml", "report.html",
    ]  # fmt: skip
    assert "calibration data: 12 samples in 4 batches" in result.stdout
    assert re.search(r"new weights in the mask files: .* kB at 0\.5, .* at 0\.75", result.stdout)
    assert "images that could not be used: 0 of 12" in result.stdout
    assert "stage 0 of 3\nstage 1 of 3\nstage 2 of 3\n" in result.stderr
    assert "warning" not in result.stderr


def test_the_models_it_saves_have_the_new_weights(vlp, words, xvlm, tmp_path):
    vlp("prune", *words, "--out", tmp_path / "out", "--save-model")

    path = "text_encoder.bert.encoder.layer.1.intermediate.dense.weight"
    for title in ("0.5", "0.75"):
        dense = XvlmForPretraining.from_pretrained(xvlm).state_dict()
        pruned = XvlmForPretraining.from_pretrained(tmp_path / "out" / f"model-{title}")
        masks = Masks.load(tmp_path / "out" / f"masks-{title}.safetensors")
        assert masks.verify(pruned) == []
        state = pruned.state_dict()
        mask = masks["fusion.0.ffn.fc1"]
        assert torch.equal(state[path], torch.where(mask, 2 * dense[path], 0))


def test_the_report_shows_what_the_method_says(vlp, words, tmp_path):
    vlp("prune", *words, "--out", tmp_path / "out", "--lambda", "1e-5")

    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert re.search(r">lambda</td><td[^>]*>1e-05</td>", page)
    assert ">0.1: 2; 1: 0.25</td>" in page
    assert re.search(r">new weights</td><td[^>]*>of the [\d,]+ kept elements,", page)
    assert "doubling runs the model as it goes: there are no statistics of either half" in page
    assert "--lambda 1e-05" in page


def test_options_reach_the_method(vlp, words, tmp_path):
    vlp("prune", *words, "--out", tmp_path / "o", "--memory-budget", "8GiB", "--seed", 3,
        "--autocast", "bfloat16", "--skip-nonfinite", "--variant", "published", "--batches", 2,
        "--floor", "0.01", "--parameter", "stages=1")  # fmt: skip

    manifest = Masks.load(tmp_path / "o" / "masks-0.5.safetensors").manifest
    assert manifest.seed == 3
    assert manifest.calibration["batches"] == 2
    assert {
        "budget": 8 * 2**30,
        "autocast": "torch.bfloat16",
        "skip": True,
        "variant": "published",
        "limit": 2,
        "floor": 0.01,
        "stages": 1,
        "lambda": 0.5,
    }.items() <= manifest.parameters.items()


def test_after_ctrl_c_it_goes_on_from_its_last_stage(vlp, words, tmp_path):
    out = tmp_path / "out"
    ending = ["--parameter", "end=interrupt", "before=2"]
    stopped = vlp("prune", *words, "--out", out, *ending, code=130)

    assert names(tmp_path) == ["out.work"]
    told = re.search(r"^interrupted; to resume: (vlp .*)$", stopped.stderr, re.MULTILINE)[1]
    settings = ("--parameter", "end=", "before=")
    again = [word for word in shlex.split(told)[1:] if not word.startswith(settings)]
    assert again[-1] == "--resume"
    vlp(*again)

    assert names(tmp_path) == ["out"]
    found = Masks.load(out / "masks-0.5.safetensors")
    assert found.manifest.parameters["stages run"] == [2]
    vlp("prune", *words, "--out", tmp_path / "whole")
    whole = Masks.load(tmp_path / "whole" / "masks-0.5.safetensors")
    assert whole == found
    assert whole.manifest.parameters["stages run"] == [0, 1, 2]


def test_without_resume_it_starts_anew(vlp, words, tmp_path):
    out = tmp_path / "out"
    vlp("prune", *words, "--out", out, "--parameter", "end=interrupt", "before=2", code=130)
    vlp("prune", *words, "--out", out)

    assert names(tmp_path) == ["out"]
    found = Masks.load(out / "masks-0.5.safetensors")
    assert found.manifest.parameters["stages run"] == [0, 1, 2]


def test_an_error_keeps_the_stages_that_are_done(vlp, words, tmp_path):
    failed = vlp("prune", *words, "--out", tmp_path / "out", "--parameter", "end=nan", "before=1",
                 code=2)  # fmt: skip

    assert "out.work keeps what was done; --resume continues from there" in failed.stderr
    assert failed.stderr.endswith("error: that is enough\n")
    assert names(tmp_path) == ["out.work"]


@pytest.mark.parametrize(("end", "code"), [("nan", 2), ("interrupt", 130), ("error", 70)])
def test_nothing_is_left_where_nothing_was_done(vlp, words, tmp_path, end, code):
    failed = vlp("prune", *words, "--out", tmp_path / "out", "--parameter", f"end={end}", code=code)

    assert names(tmp_path) == []
    assert "--resume" not in failed.stderr


def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(vlp, words, tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.tex").write_text("years")

    failed = vlp("prune", *words, "--out", tmp_path / "out", code=2)

    assert "out.work is where the run would work, but it is not one of a run" in failed.stderr
    assert (tmp_path / "out.work" / "thesis.tex").read_text() == "years"
    assert names(tmp_path) == ["out.work"]


def test_statistics_of_an_earlier_pass_are_refused(vlp, words, pruned, tmp_path):
    statistics = pruned / "statistics.safetensors"
    failed = vlp("prune", *words, "--statistics", statistics, "--out", tmp_path / "o", code=2)

    assert "cannot use statistics of an earlier pass" in failed.stderr


def test_data_is_asked_for(xvlm, tmp_path):
    recipe = Recipe(
        model=str(xvlm), method="doubling", sparsity=(0.5,), data=DataRecipe(),
        out=str(tmp_path / "o"), device="cpu",
    )  # fmt: skip
    with pytest.raises(RecipeError, match="reads calibration data: give --data FOLDER") as raised:
        run(recipe)
    assert "--statistics" not in str(raised.value)


def test_a_plan_says_the_cost_and_runs_nothing(vlp, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doubling.Doubling, "run", None)
    text = vlp("plan", *words, "--batches", 10, "--out", tmp_path / "o").stdout

    assert names(tmp_path) == []
    assert "passes over the data: 3\n" in text
    assert re.search(r"^gradients, solvers, copies +1\.000$", text, re.MULTILINE)
    assert re.search(r"^files on the disk meanwhile +3\.000$", text, re.MULTILINE)
    each = float(re.search(r"a batch of 3, forward and backward: about ([\d.]+) s", text)[1])
    # The data has 4 batches, fewer than the 10 that are asked for.
    found = re.search(
        r"(\d+) of them in all: about (\S+) s, and 2\.0 min in addition, for masks", text
    )
    steps, seconds = int(found[1]), float(found[2])
    assert steps == 3 * 4
    assert seconds == pytest.approx(steps * each, abs=steps * 0.005 + 0.06)
    total = re.search(r"\nabout (\S+) min, peak memory about \S+ GB \(\+ 3\.0 GB on disk\)", text)
    assert float(total[1]) == pytest.approx(2 + seconds / 60, abs=0.06)
    assert "keeps nothing\n3 stages\n" in text
    peak = float(re.search(r"^peak of the process +([\d.]+)$", text, re.MULTILINE)[1])
    assert peak > 1


def test_a_plan_knows_the_counts_that_data_cannot_change(vlp, words, tmp_path):
    planned = vlp("plan", *words, "--batches", 4).stdout
    done = vlp("prune", *words, "--out", tmp_path / "o").stdout
    rows = r"^ *([\d.]+) +all +(\S+) +(\S+) +(\S+)$"
    totals = re.findall(rows, done, re.MULTILINE)

    assert len(totals) == 2
    assert re.findall(rows, planned, re.MULTILINE) == totals
    assert "how modalities and layers share it depends on the data" in planned
    assert not re.search(r"^ *[\d.]+ +vision ", planned, re.MULTILINE)


@pytest.mark.parametrize("place", ["out.work", "out.work/vlp-prune-works-here.txt", "out.work/x"])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_no_link_leads_the_work_out_of_its_folder(vlp, words, tmp_path, place, resume):
    elsewhere = tmp_path / "elsewhere"
    vlp("prune", *words, "--out", tmp_path / "out", "--parameter", "end=interrupt", "before=2",
        code=130)  # fmt: skip
    (tmp_path / "out.work").rename(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    link = tmp_path / place
    if link.parent != tmp_path:
        link.parent.mkdir()
    link.symlink_to(elsewhere if place == "out.work" else elsewhere / link.name)

    failed = vlp("prune", *words, "--out", tmp_path / "out", *resume, code=2)

    assert f"{link} is a link, and a run works there; no link is followed" in failed.stderr
    assert link.is_symlink()
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
