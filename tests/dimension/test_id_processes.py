"""Two processes that share the batches and the layers find what one finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from id_script import BATCHES, GOLDEN, run
from toy import toy_batches
from two_processes import run_two_processes

from benchmarks.parity.family import Family
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.models.discovery import registry

SCRIPT = Path(__file__).with_name("id_script.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes under torchrun left what they found."""
    folder = tmp_path_factory.mktemp("dimensions")
    run_two_processes(SCRIPT, folder)
    return folder


def sharded_alone() -> IdProfile:
    vit = Family(GOLDEN / "vit")
    model = vit.model()
    return run(vit.batches(), model, registry().adapter_for(model))


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("whole", lambda: run(toy_batches(BATCHES))),
        ("tight", lambda: run(toy_batches(BATCHES))),
        ("resumed", lambda: run(toy_batches(BATCHES))),
        ("halves", lambda: run(toy_batches(BATCHES), dtype=torch.bfloat16)),
        ("few", lambda: run(toy_batches(1, size=30))),
        ("sharded", sharded_alone),
    ],
)
def test_both_processes_return_what_one_process_finds(folder, name, alone):
    expected = alone()
    first, second = (IdProfile.load(folder / f"{name}{rank}.json") for rank in (0, 1))
    assert first == second
    assert first.settings == expected.settings
    for mine, other in zip(first.layers, expected.layers, strict=True):
        assert mine.dimension == pytest.approx(other.dimension, rel=1e-4)
        assert (mine.weight, mine.stream, mine.owner) == (other.weight, other.stream, other.owner)
        assert (mine.ambient, mine.points) == (other.ambient, other.points)


def test_an_error_of_one_process_is_raised_in_both(folder):
    for rank in (0, 1):
        message = (folder / f"nan{rank}").read_text()
        assert "the output of patch" in message
        assert "in batch 3" in message
        assert message.startswith("process 1: ") == (rank == 0)


def test_processes_that_read_different_data_are_told(folder):
    for rank in (0, 1):
        assert "process 1 read other data (8 batches" in (folder / f"data{rank}").read_text()
