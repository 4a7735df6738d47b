"""Every mistake ends in one line that says what to do; nothing is written."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import bad_world
import click
import pytest
import torch
from click.testing import Result
from mistakes import HALF, MAGNITUDE, MISTAKES
from safetensors.torch import load_file
from vlp_command import Command

from vlp_adapters.xvlm import XvlmForPretraining
from vlp_plugins.masks.masks import Masks
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import BatchError
from vlp_plugins.runtime.files import reserved
from vlp_plugins.scoring.magnitude import Magnitude


@pytest.fixture(scope="module")
def world(tmp_path_factory, models, photos, pruned) -> dict[str, Path]:
    return bad_world.make(tmp_path_factory.mktemp("bad"), models, photos, pruned)


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """Nobody waits for the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def only_line(result: Result) -> str:
    """What follows `error: ` on the one line that is printed."""
    found = re.fullmatch(r"error: (.*)\n", result.stderr)
    assert found, result.stderr
    return found[1]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake(vlp: Command, world, tmp_path: Path, words: str, message: str) -> None:
    before = bad_world.listing(world["taken"].parent)
    result = vlp(*filled(words, world, tmp_path), code=2)
    assert re.search(message, only_line(result)), result.stderr
    assert list(tmp_path.iterdir()) == [], "neither the folder nor a temporary or a checkpoint"
    assert bad_world.listing(world["taken"].parent) == before


def filled(words: str, world: dict[str, Path], folder: Path) -> list[str]:
    """The words of a command with its paths; `{out}` is in the folder."""
    return [word.format(**world, out=folder / "out") for word in words.split()]


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """The operating system refuses to let a file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (500, HALF),  # the checkpoint does not fit
        (3000, f"{MAGNITUDE} --model {{xvlm}}"),  # the masks do not fit
        (20_000, f"{MAGNITUDE} --model {{xvlm}} --save-model"),  # the model does not fit
        (20_000, "masks apply {masks} {xvlm} --out {out}"),
        (3000, "masks invert {masks} --out {out}"),
    ],
)
def test_a_full_disk(vlp, world, tmp_path, size, words) -> None:
    arguments = filled(words, world, tmp_path)
    with disk_of(size):
        result = vlp(*arguments, code=2)
    assert "no space left on the disk" in only_line(result)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_resumed_from_and_stays(vlp, world, tmp_path) -> None:
    checkpoint = tmp_path / "out.checkpoint"
    checkpoint.write_bytes(world["truncated_statistics"].read_bytes())
    result = vlp(*filled(HALF, world, tmp_path), "--resume", code=2)
    assert "delete it and run the pass from the start" in only_line(result)
    assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoint"]


def test_a_batch_without_an_attention_mask(xvlm: Path) -> None:
    model = XvlmForPretraining.from_pretrained(xvlm)
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16), "input_ids": torch.ones(2, 4).long()}
    with pytest.raises(BatchError, match="has no attention_mask .*padding=True, which returns one"):
        prune(model, [batch], sparsity=0.5)


def test_masks_that_do_not_fit_leave_the_model_alone(vlp, world, tmp_path) -> None:
    before = load_file(world["vit"] / "model.safetensors")
    vlp("masks", "apply", world["masks"], world["vit"], "--out", tmp_path / "o", code=2)
    after = load_file(world["vit"] / "model.safetensors")
    assert all(before[name].equal(after[name]) for name in before)


def test_a_bug_is_one_line_with_another_exit_code(vlp, world, monkeypatch) -> None:
    def broken(path: object) -> Masks:
        raise KeyError("surprise")

    monkeypatch.setattr(Masks, "load", broken)
    result = vlp("masks", "show", world["masks"], code=70)
    assert "unexpected KeyError: 'surprise'" in result.stderr
    assert "VLP_TRACEBACK=1" in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "error: out of memory; give a smaller --batch-size"),
        (RuntimeError("CUDA out of memory. Tried"), "error: out of memory; give a smaller"),
        (PermissionError(13, "Permission denied", "/x"), "error: Permission denied: /x"),
    ],
)
def test_errors_of_the_system(vlp, world, monkeypatch, error, message) -> None:
    def failing(path: object) -> Masks:
        raise error

    monkeypatch.setattr(Masks, "load", failing)
    assert vlp("masks", "show", world["masks"], code=2).stderr.startswith(message)


def test_two_runs_do_not_write_one_folder(vlp, world, tmp_path) -> None:
    """What a run keeps next to its folder belongs to it from the start."""
    out = tmp_path / "out"
    data = ("--data", world["photos"], "--device", "cpu")
    with reserved(out):
        for words in (
            ("prune", "--model", world["xvlm"], "--sparsity", "0.5", *data),
            ("id", world["xvlm"], *data),
            ("sensitivity", world["xvlm"], *data),
            ("finetune", world["xvlm"], "--task", "retrieval", "--steps", "1", *data),
            ("evaluate", world["xvlm"], "--task", "retrieval", *data),
            ("masks", "apply", world["masks"], world["xvlm"], "--device", "cpu"),
        ):
            assert "another run is writing" in vlp(*words, "--out", out, code=2).stderr
    assert not list(tmp_path.iterdir())


def test_a_scorer_that_ends_the_program_is_named(vlp, world, tmp_path, monkeypatch) -> None:
    words = ("prune", "--model", world["xvlm"], "--method", "omp", "--sparsity", "0.5")
    monkeypatch.setattr(Magnitude, "score", lambda *_: sys.exit(0))
    for allocation in ("global", "layer"):
        found = vlp(*words, "--allocation", allocation, "--out", tmp_path / "out", code=2)
        assert "scorer 'magnitude' calls sys.exit(0)" in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_scorer_that_exits_as_commands_do_is_named(vlp, world, tmp_path, monkeypatch) -> None:
    def score(*_: object) -> None:
        raise click.exceptions.Exit(0)

    monkeypatch.setattr(Magnitude, "score", score)
    words = ("prune", "--model", world["xvlm"], "--method", "omp", "--sparsity", "0.5")
    found = vlp(*words, "--allocation", "layer", "--out", tmp_path / "out", code=2)
    assert "scorer 'magnitude' calls Exit(0)" in found.stderr


def test_other_code_that_ends_the_program_is_named(vlp, world, monkeypatch) -> None:
    monkeypatch.setattr(Masks, "load", lambda _: sys.exit(0))
    found = vlp("masks", "show", world["masks"], code=70)
    assert re.search(r"error: test_bad_input\..*<lambda> ended the program", found.stderr)
