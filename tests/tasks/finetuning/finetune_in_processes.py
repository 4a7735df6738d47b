"""What two processes of `accelerate` fine-tune; started by test_finetune_processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from finetuning_examples import Case, batches, case
from torch import distributed

from vlp_plugins.hosts.accelerate import AccelerateEngine, launched
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.tasks.finetuning.finetune import finetune
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings

TASKS = (("xvlm", "retrieval"), ("vit", "classification"), ("blip", "captioning"))
CLIPPED = FinetuneSettings(learning_rate=1e-3, epochs=2, weight_decay=0.1, clip=0.5)


class Stopped(Exception):
    """Stands for Ctrl-C."""


def train(made: Case, task: str, engine: AccelerateEngine, settings: FinetuneSettings) -> None:
    finetune(
        made.model, made.adapter, batches(task, 8), task=task, masks=made.masks,
        settings=settings, engine=engine,
    )  # fmt: skip


def queues(folder: Path, engine: AccelerateEngine) -> None:
    """BLIP's momentum queues are every process's own, and go on where they were."""
    whole, stopped, again = (case("blip", "retrieval") for _ in range(3))

    def run(made: Case, place: Path, *, stop: int | None = None, resume: bool = False) -> None:
        def progress(done: int, _: int) -> None:
            if done == stop:
                raise Stopped

        finetune(
            made.model, made.adapter, batches("retrieval", 8), task="retrieval", masks=made.masks,
            settings=CLIPPED, engine=AccelerateEngine(engine.accelerator), workplace=place,
            resume=resume, checkpoint_every=3, progress=progress,
        )  # fmt: skip

    run(whole, folder / "whole")
    with pytest.raises(Stopped):
        run(stopped, folder / "parts", stop=5)
    run(again, folder / "parts", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    seen = [torch.empty_like(whole.model.text_queue) for _ in range(2)]
    distributed.all_gather(seen, whole.model.text_queue)
    assert not torch.equal(*seen)
    weights = [torch.empty_like(whole.model.vision_proj.weight) for _ in range(2)]
    distributed.all_gather(weights, whole.model.vision_proj.weight.detach())
    assert torch.equal(*weights)
    if engine.index == 0:
        assert (folder / "whole/losses.jsonl").read_text() == (
            folder / "parts/losses.jsonl"
        ).read_text()
    one = case("blip", "retrieval")
    with pytest.raises(DataError, match="number of processes is 2, this one's is 1"):
        finetune(
            one.model, one.adapter, batches("retrieval", 8)[::2], task="retrieval",
            masks=one.masks, settings=CLIPPED, workplace=folder / "parts", resume=True,
        )  # fmt: skip


def main(folder: Path) -> None:
    """Process 0 says what came out."""
    with launched(cpu=True) as engine:
        assert engine.processes == 2
        for family, task in TASKS:
            made = case(family, task)
            train(made, task, engine, CLIPPED)
            if engine.index == 0:
                torch.save(made.model.state_dict(), folder / f"{family}-{task}.pt")
        queues(folder, engine)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
