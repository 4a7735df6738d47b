"""Interrupted runs go on bit by bit; accumulation, clipping and precision; the log."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning_examples import FAST, Case, assert_alike, batch, batches, case
from torch.utils.data import DataLoader

from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.runtime.errors import DataError, MaskError, RecipeError
from vlp_plugins.tasks.finetuning.files import seed_of
from vlp_plugins.tasks.finetuning.finetune import finetune
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings

RUN = FinetuneSettings(learning_rate=1e-3, epochs=3, weight_decay=0.1, warmup=0.2)


class Stopped(Exception):
    """Stands for Ctrl-C."""


def run(made: Case, task: str, folder: Path | None, stop: int | None = None, **options: Any) -> Any:
    def progress(done: int, total: int) -> None:
        if done == stop:
            raise Stopped

    given = {"masks": made.masks, "settings": RUN, "log_every": 4, "checkpoint_every": 5}
    return finetune(
        made.model, made.adapter, options.pop("batches", batches(task)), task=task,
        workplace=folder, progress=progress, **given | options,
    )  # fmt: skip


def state_of(made: Case) -> dict[str, torch.Tensor]:
    return made.model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(("family", "task"), [("blip", "retrieval"), ("xvlm", "vqa")])
@pytest.mark.parametrize("stop", [3, 7])
def test_an_interrupted_run_goes_on_bit_by_bit(family, task, stop, tmp_path) -> None:
    whole = case(family, task)
    run(whole, task, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(case(family, task), task, tmp_path / "parts", stop=stop)
    torch.manual_seed(99)  # whatever else has drawn numbers meanwhile
    again = case(family, task)
    done = run(again, task, tmp_path / "parts", resume=True)
    assert done.resumed_from == {3: 0, 7: 5}[stop]
    assert same(state_of(again), state_of(whole))
    logs = [(tmp_path / name / "losses.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    lines = [json.loads(line) for line in logs[0].splitlines()]
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12]
    assert lines == list(done.log)


def test_the_global_random_state_and_training_flags_stay() -> None:
    made = case("xvlm", "captioning")
    made.model.train()
    made.model.vision_encoder.eval()
    flags = [module.training for module in made.model.modules()]
    state = torch.get_rng_state()
    run(made, "captioning", None, settings=FAST)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in made.model.modules()] == flags


def test_a_state_of_another_run_is_refused(tmp_path) -> None:
    with pytest.raises(Stopped):
        run(case("vit", "classification"), "classification", tmp_path, stop=6)
    with pytest.raises(DataError, match=r"its learning_rate is 0.001, this one's is 0.002"):
        run(case("vit", "classification"), "classification", tmp_path, resume=True,
            settings=replace(RUN, learning_rate=2e-3))  # fmt: skip
    with pytest.raises(DataError, match="its masks is"):
        run(case("vit", "classification", sparsity=0.5), "classification", tmp_path, resume=True)
    with pytest.raises(DataError, match="give workplace"):
        run(case("vit", "classification"), "classification", None, resume=True)
    file = tmp_path / "finetuning.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="damaged"):
        run(case("vit", "classification"), "classification", tmp_path, resume=True)


def test_without_a_state_a_resumed_run_begins_and_says_so(tmp_path, caplog) -> None:
    done = run(case("vit", "classification"), "classification", tmp_path, resume=True)
    assert done.resumed_from == 0
    assert "starting from the first step" in caplog.text


def test_accumulating_is_a_step_with_a_batch_of_twice_the_size() -> None:
    halves = batches("classification", 8, rows=3)
    pairs = zip(halves[::2], halves[1::2], strict=True)
    double = [{k: torch.cat([one[k], two[k]]) for k in one} for one, two in pairs]
    made, other = (case("vit", "classification") for _ in range(2))
    run(made, "classification", None, batches=halves, settings=replace(RUN, accumulate=2))
    run(other, "classification", None, batches=double)
    assert_alike(state_of(made), state_of(other))


def test_clipping_looks_at_what_is_kept_only() -> None:
    made, other = (case("xvlm", "captioning") for _ in range(2))
    settings = FinetuneSettings(learning_rate=1e-3, steps=1, clip=1e-3)
    done = run(made, "captioning", None, settings=settings)
    model = other.model
    other.masks.apply(model, other.adapter)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(0, 0, 0))
        other.adapter.losses(model, batch("captioning"))["lm"].backward()
    SparsityLock(model, other.masks, other.adapter).mask_gradients()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert done.log[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_trains_float32_weights(dtype: str) -> None:
    exact, made = (case("vit", "classification") for _ in range(2))
    wanted = run(exact, "classification", None)
    found = run(made, "classification", None, settings=replace(RUN, autocast=dtype, clip=10.0))
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert found.log[-1]["loss"] != wanted.log[-1]["loss"]
    assert found.log[-1]["loss"] == pytest.approx(wanted.log[-1]["loss"], rel=0.03)


def test_a_state_of_float16_keeps_the_scale_of_the_loss(tmp_path) -> None:
    settings = replace(RUN, autocast="float16")
    whole, again = (case("vit", "classification") for _ in range(2))
    run(whole, "classification", None, settings=settings)
    with pytest.raises(Stopped):
        run(case("vit", "classification"), "classification", tmp_path, stop=6, settings=settings)
    run(again, "classification", tmp_path, resume=True, settings=settings)
    assert same(state_of(again), state_of(whole))


def test_a_log_whose_last_line_is_torn_does_not_stop_a_resumed_run(tmp_path) -> None:
    with pytest.raises(Stopped):
        run(case("vit", "classification"), "classification", tmp_path, stop=7)
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"step": 7, "epo')
    done = run(case("vit", "classification"), "classification", tmp_path, resume=True)
    assert [line["step"] for line in done.log] == [4, 5, 8, 10, 12]
    lines = (tmp_path / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 5, 8, 10, 12]


def test_a_loader_that_shuffles_goes_on_in_the_same_order(tmp_path) -> None:
    task = "classification"
    loader = DataLoader(batches(task), batch_size=None, shuffle=True)
    whole = case("vit", task)
    run(whole, task, None, batches=loader)
    with pytest.raises(Stopped):
        run(case("vit", task), task, tmp_path, stop=7, batches=loader)
    torch.manual_seed(99)
    again = case("vit", task)
    assert run(again, task, tmp_path, resume=True, batches=loader).resumed_from == 5
    assert same(state_of(again), state_of(whole))


def test_epochs_may_differ_and_batches_be_made_when_needed() -> None:
    made: list[tuple[int, int]] = []

    def of(epoch: int) -> Iterable[Any]:
        def lazy(number: int) -> Any:
            def make() -> dict[str, torch.Tensor]:
                made.append((epoch, number))
                return batch("classification", 10 * epoch + number)

            return make

        return [lazy(number) for number in range(5)]

    run(case("vit", "classification"), "classification", None, batches=of,
        settings=replace(RUN, accumulate=2, epochs=2))  # fmt: skip
    assert made == [(epoch, number) for epoch in (0, 1) for number in range(4)]  # 5 = 2 x 2 + 1


def test_too_few_batches_and_unknown_lengths_say_so() -> None:
    made = case("vit", "classification")
    with pytest.raises(DataError, match="an epoch has 4 batches, but a step takes 6"):
        run(made, "classification", None, settings=replace(RUN, accumulate=6))
    with pytest.raises(RecipeError, match="give the number of steps"):
        run(made, "classification", None, batches=iter(batches("classification")))
    with pytest.raises(DataError, match="can be iterated again"):
        run(made, "classification", None, batches=iter(batches("classification")), settings=FAST)
    with pytest.raises(DataError, match="a single batch"):
        run(made, "classification", None, batches=batch("classification"))


def test_a_state_is_not_saved_of_a_model_whose_zeros_were_lost(tmp_path) -> None:
    made = case("vit", "classification")

    def spoil(done: int, total: int) -> None:
        with torch.no_grad():
            made.model.vit.layers[0].mlp.fc1.weight.fill_(1.0)

    with pytest.raises(MaskError, match="locked weights are not zero"):
        finetune(
            made.model, made.adapter, batches("classification"), task="classification",
            masks=made.masks, settings=FAST, workplace=tmp_path, checkpoint_every=1, progress=spoil,
        )  # fmt: skip
    assert not (tmp_path / "finetuning.safetensors").exists()


def test_batches_made_ahead_give_the_same_bits() -> None:
    def of(epoch: int) -> Iterable[Any]:
        return [partial(batch, "classification", 10 * epoch + number) for number in range(4)]

    made, other = (case("vit", "classification") for _ in range(2))
    run(made, "classification", None, batches=of)
    run(other, "classification", None, batches=of, workers=2)
    assert same(state_of(made), state_of(other))


def test_an_error_of_a_batch_made_ahead_comes_in_its_turn() -> None:
    steps: list[int] = []

    def broken() -> Any:
        raise DataError("no such image")

    given = [*batches("classification", 3), broken]
    made = case("vit", "classification")
    with pytest.raises(DataError, match="no such image"):
        finetune(
            made.model, made.adapter, given, task="classification", settings=FAST, workers=2,
            progress=lambda done, _: steps.append(done),
        )  # fmt: skip
    assert steps == [1, 2, 3]
