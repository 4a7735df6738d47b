"""Two processes of `accelerate` fine-tune like one that accumulates twice as many batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from two_processes import run_two_processes

pytest.importorskip("accelerate")

from finetune_in_processes import CLIPPED, TASKS, train
from finetuning_examples import Case, assert_alike, batches, case

from vlp_plugins.tasks.finetuning.engine import Engine
from vlp_plugins.tasks.finetuning.finetune import finetune

SCRIPT = Path(__file__).with_name("finetune_in_processes.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they trained."""
    folder = tmp_path_factory.mktemp("processes")
    run_two_processes(SCRIPT, folder)
    return folder


def close(made: Case, found: dict[str, torch.Tensor]) -> None:
    assert_alike(found, made.model.state_dict())
    made.model.load_state_dict(found)
    assert made.masks.verify(made.model, made.adapter) == []


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_two_processes_do_what_one_does_in_two_parts(place, family, task) -> None:
    made = case(family, task)
    train(made, task, Engine("cpu"), replace(CLIPPED, accumulate=2))
    close(made, torch.load(place / f"{family}-{task}.pt", weights_only=True))


def test_two_processes_do_what_one_does_with_batches_of_twice_the_size(place) -> None:
    halves = batches("classification", 8)
    pairs = zip(halves[::2], halves[1::2], strict=True)
    double = [{key: torch.cat([one[key], two[key]]) for key in one} for one, two in pairs]
    made = case("vit", "classification")
    finetune(
        made.model, made.adapter, double, task="classification", masks=made.masks,
        settings=CLIPPED,
    )  # fmt: skip
    close(made, torch.load(place / "vit-classification.pt", weights_only=True))
