"""Learning rates against their formulas, and which parameters are decayed."""

from __future__ import annotations

import math

import pytest
import torch
from finetuning_examples import FAST, batches, case

from vlp_plugins.runtime.errors import RecipeError, UnsupportedError
from vlp_plugins.tasks.finetuning.finetune import finetune
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings, build_optimizer, factor


def test_cosine_and_linear_follow_their_formulas_after_the_warmup() -> None:
    steps, rise = 50, 5
    for step in range(steps):
        done = (step - rise) / (steps - rise)
        warm = (step + 1) / rise
        cosine = warm if step < rise else (1 + math.cos(math.pi * done)) / 2
        linear = warm if step < rise else 1 - done
        assert factor(step, steps, schedule="cosine", warmup=0.1) == pytest.approx(cosine)
        assert factor(step, steps, schedule="linear", warmup=0.1) == pytest.approx(linear)
        assert factor(step, steps, schedule="constant", warmup=0.1) == min(1.0, warm)


def test_without_a_warmup_the_first_step_has_the_whole_rate_and_the_last_some() -> None:
    for schedule in ("cosine", "linear", "constant"):
        assert factor(0, 7, schedule=schedule) == 1.0
        assert 0 < factor(6, 7, schedule=schedule) <= 1.0
        assert factor(0, 1, schedule=schedule, warmup=0.9) == 1.0


def test_the_log_has_the_rates_of_the_steps() -> None:
    made = case("vit", "classification")
    settings = FinetuneSettings(learning_rate=2e-3, epochs=3, schedule="linear", warmup=0.25)
    done = finetune(
        made.model, made.adapter, batches("classification"), task="classification",
        settings=settings, log_every=1,
    )  # fmt: skip
    assert done.steps == 12
    assert [line["epoch"] for line in done.log] == [0] * 4 + [1] * 4 + [2] * 4
    rates = [2e-3 * factor(s, 12, schedule="linear", warmup=0.25) for s in range(12)]
    assert [line["learning_rate"] for line in done.log] == pytest.approx(rates)


def test_vectors_are_not_decayed() -> None:
    model = case("xvlm", "captioning").model
    decayed, others = build_optimizer(model, FAST).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    kept = {names[id(parameter)] for parameter in others["params"]}
    ends = ("bias", "class_embedding")
    assert kept == {n for n in names.values() if n.endswith(ends) or "norm" in n.lower()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_one_step_is_that_of_adamw() -> None:
    made, other = case("vit", "classification"), case("vit", "classification")
    settings = FinetuneSettings(learning_rate=1e-2, steps=1, betas=(0.8, 0.9), weight_decay=0.3)
    (batch,) = batches("classification", 1)
    finetune(made.model, made.adapter, [batch], task="classification", settings=settings)

    model = other.model
    parameters = list(model.parameters())
    groups = [{"params": [p], "weight_decay": 0.3 if p.ndim > 1 else 0.0} for p in parameters]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9))
    model(**batch).loss.backward()
    optimizer.step()
    for one, two in zip(made.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"warmup": 1.0}, "warm-up must be a fraction"),
        ({"betas": (0.9, 1.0)}, "betas must be from 0"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"accumulate": 0}, "accumulated batches must be 1"),
        ({"clip": 0.0}, "clip at must be above 0"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        FinetuneSettings(**values)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="autocast 'fp16' is unknown"):
        FinetuneSettings(autocast="fp16")
