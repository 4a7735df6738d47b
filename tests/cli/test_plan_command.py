"""`vlp plan`: counts, memory and time before any data is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vlp_command import Command

from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig
from vlp_plugins.runtime.memory import bytes_of


def counts_of(text: str) -> list[str]:
    """The rows of counts: sparsity, modality, numbers."""
    return re.findall(r"^ *[\d.]+ +(?:vision|text|fusion|all) +[\d.]+% .*$", text, re.MULTILINE)


@pytest.mark.parametrize("method", ["multiflow", "omp", "wanda"])
def test_the_counts_are_those_of_the_run(vlp: Command, xvlm, photos, tmp_path, method) -> None:
    words = ("--model", xvlm, "--method", method, "--sparsity", "0.63", "0.9", "--data", photos)
    planned = vlp("plan", *words).stdout
    done = vlp("prune", *words, "--out", tmp_path / "o").stdout
    assert len(counts_of(planned)) == 8
    assert counts_of(planned) == counts_of(done)


def test_groups_memory_passes_and_time(vlp, xvlm) -> None:
    words = ("--model", xvlm, "--sparsity", "0.5", "--batches", "10", "--data", "nowhere")
    text = vlp("plan", *words).stdout
    assert re.search(r"fusion +1 +10 +[\d,]+$", text, re.MULTILINE)
    assert re.search(r"^peak of the process +\d\.\d{3}$", text, re.MULTILINE)
    assert "passes over the data: 1\n" in text
    assert re.search(r"a batch of 32: about [\d.]+ s\n10 batches: about [\d.]+ (s|min)", text)


def test_no_data_is_read_and_nothing_written(vlp, xvlm, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--sparsity", "0.5", "--data", tmp_path / "not there", "--out", tmp_path / "o")
    vlp("plan", "--model", xvlm, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_method_without_data_needs_no_pass_and_no_processor(vlp, xvlm, tmp_path) -> None:
    model = XvlmForPretraining.from_pretrained(xvlm)
    model.save_pretrained(tmp_path / "bare")
    text = vlp("plan", "--model", tmp_path / "bare", "--method", "lamp", "--sparsity", "0.5").stdout
    assert "passes over the data: 0\n" in text
    assert "a batch" not in text


def test_statistics_of_an_earlier_run_need_no_pass(vlp, xvlm, pruned) -> None:
    words = ("--sparsity", "0.5", "--statistics", pruned / "statistics.safetensors")
    assert "passes over the data: 0\n" in vlp("plan", "--model", xvlm, *words).stdout


def peak_of(model: Path, *words: object) -> float:
    """Bytes that `vlp plan` (in GB) or `vlp prune` prints, in a process of its own."""
    command = [sys.executable, "-m", "vlp_plugins", *words, "--model", model, "--device", "cpu"]
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"peak (?:memory )?of the process:? +([\d.]+)(.*)", done.stdout)
    return bytes_of(found[1] + (found[2] or " GB"))


def test_the_predicted_peak_is_that_of_the_run(xvlm, photos, tmp_path) -> None:
    words = ("--sparsity", "0.5", "--data", photos)
    planned = peak_of(xvlm, "plan", *words)
    measured = peak_of(xvlm, "prune", *words, "--out", tmp_path / "o")
    assert abs(planned - measured) <= 0.2 * measured


@pytest.mark.long
def test_the_predicted_peak_of_a_full_size_model(xvlm, photos, tmp_path) -> None:
    torch.manual_seed(0)
    model = XvlmForPretraining(XvlmPretrainConfig.base())
    model.save_pretrained(tmp_path / "base")
    for path in xvlm.glob("tokenizer*"):
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "base" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessorPil", "size": {"shortest_edge": 224}, '
        '"crop_size": {"height": 224, "width": 224}}'
    )
    words = ("--sparsity", "0.63", "0.75", "0.9", "--data", photos, "--batch-size", "4")
    planned = peak_of(tmp_path / "base", "plan", *words)
    measured = peak_of(tmp_path / "base", "prune", *words, "--out", tmp_path / "o")
    assert abs(planned - measured) <= 0.2 * measured
