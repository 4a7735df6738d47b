"""SNIP, IterSNIP, TAMT and CHITA by the command: their plans, statistics and counts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from vlp_command import Command

from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.checkpoint import Checkpoint


@pytest.fixture
def words(xvlm: Path, photos: Path) -> list[object]:
    return ["--model", xvlm, "--data", photos, "--batch-size", "3", "--device", "cpu"]


def totals_of(text: str) -> list[list[str]]:
    return [line.split() for line in re.findall(r"^ *[\d.]+ +all +.*$", text, re.MULTILINE)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("snip", []),
        ("itersnip", ["--parameter", "rounds=2"]),
        ("tamt", []),
        ("chita", ["--lambda", "0.1", "--memory-budget", "100 MB"]),
        ("chita++", ["--lambda", "0.1", "--parameter", "rounds=2"]),
    ],
)
def test_the_planned_counts_are_those_of_the_run(
    vlp: Command, words, tmp_path, method, options
) -> None:
    words = [*words, "--method", method, "--sparsity", "0.5", "0.9", "--batches", "4", *options]
    planned = vlp("plan", *words).stdout
    done = vlp("prune", *words, "--out", tmp_path / "o").stdout

    assert len(totals_of(done)) == 2
    assert totals_of(planned) == totals_of(done)
    assert "how modalities and layers share it depends on the data" in planned
    assert re.search(r"a batch of 3(, forward and backward)?: about \d", planned)


def test_chita_chooses_lambda_before_the_eyes_of_the_user(vlp, words, tmp_path) -> None:
    words = [*words, "--method", "chita", "--sparsity", "0.5", "--lambda", "auto"]
    told = vlp("prune", *words, "--out", tmp_path / "o").stderr

    curve = re.findall(r"^ +(\S+) +([\d.]+)(  <- chosen)?$", told, re.MULTILINE)
    assert len(curve) > 5
    (chosen,) = [float(value) for value, _, mark in curve if mark]
    masks = Masks.load(tmp_path / "o" / "masks-0.5.safetensors")
    assert masks.manifest.parameters["lambda"] == pytest.approx(chosen, rel=0.01)
    assert masks.new_values is not None
    page = (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    assert "lambda_curve" in page
    assert "of new weights" in vlp("masks", "show", tmp_path / "o" / "masks-0.5.safetensors").stdout


def test_budgets_per_modality_are_known_beforehand(vlp, words, tmp_path) -> None:
    words = [*words, "--method", "itersnip", "--parameter", "rounds=2", "--batches", "4"]
    words += ["--sparsity", "vision=0.5,text=0.75,fusion=0.9"]
    rows = r"^vision=\S+ +(?:vision|text|fusion|all) +.*$"
    planned = re.findall(rows, vlp("plan", *words).stdout, re.MULTILINE)
    done = re.findall(rows, vlp("prune", *words, "--out", tmp_path / "o").stdout, re.MULTILINE)

    assert len(planned) == 4
    assert planned == done


def test_gradient_statistics_are_written_and_serve_again(vlp, words, xvlm, tmp_path) -> None:
    vlp("prune", *words, "--method", "snip", "--sparsity", "0.5", "--out", tmp_path / "o")
    vlp("prune", "--model", xvlm, "--method", "snip", "--sparsity", "0.5", "--device", "cpu",
        "--statistics", tmp_path / "o" / "statistics.safetensors",
        "--out", tmp_path / "again")  # fmt: skip

    masks = "masks-0.5.safetensors"
    assert Masks.load(tmp_path / "o" / masks) == Masks.load(tmp_path / "again" / masks)
    page = (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    assert re.search(
        r">0.5</td><td>all</td><td [^>]*>\d\d\.\d+%</td><td [^>]*>0\.\d+</td></tr>", page
    )


def test_large_statistics_are_written_on_request_only(vlp, words, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("vlp_plugins.jobs.facts.LARGE_STATISTICS", 1000)
    words = [*words, "--method", "snip", "--sparsity", "0.5"]
    text = vlp("prune", *words, "--out", tmp_path / "o").stdout
    kept = vlp("prune", *words, "--out", tmp_path / "kept", "--keep-statistics").stdout

    assert not (tmp_path / "o" / "statistics.safetensors").exists()
    assert re.search(r"statistics: [\d.]+ kB, not written \(--keep-statistics", text)
    assert (tmp_path / "kept" / "statistics.safetensors").exists()
    assert "not written" not in kept
    assert "the statistics are not written: --keep-statistics" in vlp("plan", *words).stdout
    assert "not written" not in vlp("plan", *words, "--keep-statistics").stdout


def test_itersnip_goes_on_after_the_round_that_was_interrupted(
    vlp, words, tmp_path, monkeypatch
) -> None:
    words = [*words, "--method", "itersnip", "--parameter", "rounds=4", "--sparsity", "0.75"]
    save = Checkpoint.save
    rounds = []

    def interrupted(self: Checkpoint, convert: Any) -> None:
        save(self, convert)
        rounds.append(len(convert()[1]["digests"]))
        if rounds == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", interrupted)
    stopped = vlp("prune", *words, "--out", tmp_path / "out", code=130)
    assert "interrupted; to resume: vlp prune" in stopped.stderr
    vlp("prune", *words, "--out", tmp_path / "out", "--resume")
    assert rounds == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    vlp("prune", *words, "--out", tmp_path / "whole")
    masks = "masks-0.75.safetensors"
    assert Masks.load(tmp_path / "out" / masks) == Masks.load(tmp_path / "whole" / masks)
