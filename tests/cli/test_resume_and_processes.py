"""Statistics without data, an interrupted run, several processes: always the same bits."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
from vlp_command import Command

from vlp_plugins.masks.masks import Masks

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_other_sparsities_come_from_statistics_without_data(vlp: Command, pruned, xvlm, tmp_path):
    statistics = pruned / "statistics.safetensors"
    result = vlp(
        "prune", "--model", xvlm, "--statistics", statistics, "--sparsity", "0.9", "0.3",
        "--out", tmp_path / "o",
    )  # fmt: skip
    again = Masks.load(tmp_path / "o" / "masks-0.9.safetensors")
    assert again == Masks.load(pruned / "masks-0.9.safetensors")
    assert again.manifest.calibration["batches"] == 4
    assert "read in an earlier run" in result.stdout
    assert "data pass" not in result.stdout
    assert (tmp_path / "o" / "statistics.safetensors").read_bytes() == statistics.read_bytes()


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory) -> Path:
    return tiny_models.save_photos(tmp_path_factory.mktemp("many") / "photos", 400)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_and_resume_give_the_bits_of_an_uninterrupted_run(
    vlp, xvlm, many_photos, tmp_path, number, code
):
    words = [
        "prune", "--model", str(xvlm), "--sparsity", "0.75", "--data", str(many_photos),
        "--batch-size", "2", "--checkpoint-every", "5", "--device", "cpu", "--workers", "3",
    ]  # fmt: skip
    out, checkpoint = tmp_path / "out", tmp_path / "out.checkpoint"
    command = [sys.executable, "-m", "vlp_plugins", *words, "--out", str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    begin = time.monotonic()
    while not checkpoint.exists() and process.poll() is None and time.monotonic() - begin < 120:
        time.sleep(0.01)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)

    assert process.returncode == code, text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.checkpoint"]
    assert "Traceback" not in text
    repeat = shlex.split(re.search(r"^interrupted; to resume: (vlp .*)$", text, re.MULTILINE)[1])
    assert repeat[-1] == "--resume"

    result = vlp(*repeat[1:])
    assert "samples in 200 batches" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    vlp(*words, "--out", tmp_path / "whole")
    for name in ("masks-0.75.safetensors",):
        assert Masks.load(out / name) == Masks.load(tmp_path / "whole" / name)


def test_any_number_of_workers_makes_the_same_masks(vlp, pruned, xvlm, photos, tmp_path):
    for workers in ("0", "3"):
        vlp(
            "prune", "--model", xvlm, "--sparsity", "0.75", "--data", photos, "--batch-size", "3",
            "--device", "cpu", "--workers", workers, "--out", tmp_path / workers,
        )  # fmt: skip
        masks = Masks.load(tmp_path / workers / "masks-0.75.safetensors")
        assert masks == Masks.load(pruned / "masks-0.75.safetensors")
        assert masks.manifest.calibration["batches"] == 4


@pytest.mark.parametrize("workers", ["0", "3"])
@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (MemoryError(), 2, "out of memory"),
        (SystemExit("left"), 70, "ended the program by sys.exit"),
    ],
)
def test_a_worker_that_crashes_ends_the_run_with_a_sentence(
    vlp, xvlm, photos, tmp_path, monkeypatch, workers, error, code, sentence
):
    decoded = []

    def crash(image):
        decoded.append(image)
        if len(decoded) == 5:
            raise error
        return image.convert("RGB")

    monkeypatch.setattr("vlp_plugins.data.records.upright_rgb", crash)
    result = vlp(
        "prune", "--model", xvlm, "--sparsity", "0.5", "--data", photos, "--batch-size", "2",
        "--workers", workers, "--out", tmp_path / "o", code=code,
    )  # fmt: skip
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()


def test_resume_without_a_checkpoint_says_so_and_begins(vlp, xvlm, photos, tmp_path) -> None:
    result = vlp("prune", "--model", xvlm, "--sparsity", "0.5", "--data", photos,
                 "--out", tmp_path / "o", "--resume")  # fmt: skip
    assert "starting from the first batch" in result.stderr


def test_two_processes_write_one_folder_with_the_same_masks(pruned, xvlm, photos, tmp_path) -> None:
    words = [
        "prune", "--model", str(xvlm), "--sparsity", "0.63", "0.75", "0.9", "--data", str(photos),
        "--batch-size", "3", "--device", "cpu", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", "-m", "vlp_plugins", *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1
    assert "processes: 2" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name in ("masks-0.63.safetensors", "masks-0.75.safetensors", "masks-0.9.safetensors"):
        assert Masks.load(tmp_path / "out" / name) == Masks.load(pruned / name)


def test_a_file_of_someone_else_is_no_checkpoint(vlp, xvlm, photos, tmp_path) -> None:
    words = ("prune", "--model", xvlm, "--sparsity", "0.5", "--out", tmp_path / "o")
    stranger = tmp_path / "o.checkpoint"
    stranger.write_text("years of work")
    (tmp_path / "o.checkpoint.rank0of2").write_text("and more")
    failed = vlp(*words, "--data", photos, code=2)
    assert "o.checkpoint is where a run keeps its state, but no run wrote what is" in failed.stderr
    vlp(*words, "--method", "omp")  # reads no data, and deletes no checkpoint of others
    assert stranger.read_text() == "years of work"
    assert (tmp_path / "o.checkpoint.rank0of2").read_text() == "and more"


def test_a_link_is_no_checkpoint(vlp, xvlm, photos, pruned, tmp_path) -> None:
    words = ("prune", "--model", xvlm, "--sparsity", "0.5", "--data", photos)
    (tmp_path / "o.checkpoint").symlink_to(tmp_path / "victim")
    failed = vlp(*words, "--out", tmp_path / "o", code=2)
    assert "o.checkpoint is a link, and a run keeps its state there" in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.checkpoint"]
