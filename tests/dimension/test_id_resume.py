"""A run that is killed loses the pass at work, and no more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyAdapter, toy_batches, toy_model

from vlp_plugins.dimension import points as room
from vlp_plugins.dimension.measure import FORM, NAME, measure
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.dimension.twonn import Estimator
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.errors import DataError, StatisticsError

BUDGET = 30_000
PASSES = 3


@pytest.fixture(autouse=True)
def _small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "working_bytes", lambda *_: 700)


class Dying:
    """Ten batches, the same in every pass; Ctrl-C after so many of all passes."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Any]:
        for batch in toy_batches(10):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def run(folder: Path, batches: Any = None, **options: Any) -> tuple[int, IdProfile]:
    """Number of batches that were read, and the profile."""
    count = [0]
    model, adapter = options.pop("model", None) or toy_model(), ToyAdapter()
    profile = measure(
        model,
        adapter,
        WeightMap.of(model, adapter),
        toy_batches(10) if batches is None else batches,
        memory_budget=options.pop("memory_budget", BUDGET),
        workplace=folder,
        progress=lambda done, _: count.__setitem__(0, done),
        **options,
    )
    return count[0], profile


def killed(folder: Path, after: int = 15) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, Dying(after))


@pytest.mark.parametrize(("after", "again"), [(5, 3), (10, 2), (15, 2), (29, 1), (30, 0)])
def test_finished_passes_are_not_run_again(tmp_path, after, again):
    _, expected = run(tmp_path / "whole")
    if after < PASSES * 10:
        killed(tmp_path, after)
    else:
        run(tmp_path)
    count, profile = run(tmp_path, resume=True)
    assert count == again * 10
    assert profile == expected


def test_the_budget_may_change_on_the_way(tmp_path):
    killed(tmp_path)
    count, profile = run(tmp_path, resume=True, memory_budget=10**6)
    assert count == 10
    assert len(profile.layers) == 20


def test_nothing_to_resume_is_a_start_and_not_resuming_starts_again(tmp_path, caplog):
    assert run(tmp_path, resume=True)[0] == PASSES * 10
    assert "starting from the first pass" in caplog.text
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path)[0] == PASSES * 10
    assert "is not resumed and will be overwritten" in caplog.text


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (toy_batches(10, seed=1), "batch 0 is not the one"),
        (toy_batches(9), "has seen 10 batches, but the data gave only 9"),
        (toy_batches(11), "batch 10 is not the one"),
    ],
    ids=["others", "fewer", "more"],
)
def test_other_batches_are_refused(tmp_path, batches, message):
    killed(tmp_path)
    with pytest.raises(DataError, match=message):
        run(tmp_path, batches, resume=True)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"padding": "published"}, "padding"),
        ({"estimator": Estimator(fit="likelihood")}, "estimator"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"published": True, "estimator": Estimator(), "padding": "real"}, "published"),
    ],
)
def test_other_settings_are_refused(tmp_path, options, key):
    killed(tmp_path)
    with pytest.raises(StatisticsError, match=f"of another run: its {key} is .*delete it"):
        run(tmp_path, resume=True, **options)


def test_another_model_is_refused(tmp_path):
    killed(tmp_path)
    model = toy_model()
    with torch.no_grad():
        model.feed.weight.mul_(2)
    with pytest.raises(StatisticsError, match="its weights is"):
        run(tmp_path, resume=True, model=model)


def rewrite(file: Path, form: Format = FORM, **changes: Any) -> None:
    """The state with other content; what is None goes."""
    _, content = read_artifact(file, FORM)
    content = {key: value for key, value in (content | changes).items() if value is not None}
    write_artifact(file, form, {}, content, overwrite=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("[]"),
        lambda file: rewrite(file, replace(FORM, key="vlp_masks")),
        lambda file: rewrite(file, replace(FORM, schema=99)),
        lambda file: rewrite(file, found=[1]),
        lambda file: rewrite(file, sites=None),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    killed(tmp_path)
    file = tmp_path / NAME
    damage(file)
    with pytest.raises(StatisticsError, match=str(file)):
        run(tmp_path, resume=True)


def test_a_state_of_an_earlier_version_says_who_can_resume_it(tmp_path):
    (tmp_path / "intrinsic-dimensions.json").write_text('{"kind": "unfinished"}')
    with pytest.raises(StatisticsError, match="earlier version.*resume with that version, or del"):
        run(tmp_path, resume=True)
    assert run(tmp_path)[0] == PASSES * 10
    assert run(tmp_path, resume=True)[0] == 0
