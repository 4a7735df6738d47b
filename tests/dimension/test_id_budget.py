"""The memory budget decides how many passes there are, and changes no result."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive_points import measured, naive_points
from toy import ToyAdapter, toy_batches, toy_model

from vlp_plugins.dimension import points
from vlp_plugins.dimension import points as room
from vlp_plugins.dimension.data_pass import Gatherer
from vlp_plugins.dimension.measure import measure
from vlp_plugins.dimension.plan import plan
from vlp_plugins.dimension.points import Points, _spread
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, UnsupportedError

WORK = 700
"""Bytes that the search for neighbours is said to take."""
SAMPLES = 30
LARGEST = SAMPLES * 60 * 4
"""Bytes of the points of the layer that runs twice."""
TWO_PASSES = 60_300
"""Just enough for all layers of the text and the decoder, not for those of the images, too."""


@pytest.fixture(autouse=True)
def _small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "working_bytes", lambda *_: WORK)


class Meter:
    """The most bytes that points took at a time, and at the end of a pass."""

    def __init__(self) -> None:
        self.peak = self.kept = 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def now(self) -> int:
        return sum(p._values.nbytes for p in self.alive)

    def note(self, beside: int = 0) -> None:
        self.peak = max(self.peak, beside + self.now)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    found = Meter()
    init, spread, release = Points.__init__, _spread, Gatherer.release

    def watched_init(self, *args):
        init(self, *args)
        found.alive.add(self)
        found.note()

    def watched_spread(rows, widths, wider, out=None):
        result = spread(rows, widths, wider, out)
        found.note(0 if out is None else out.untyped_storage().nbytes())
        return result

    def watched_release(self, group):
        found.kept = max(found.kept, found.now)
        return release(self, group)

    monkeypatch.setattr(Gatherer, "release", watched_release)
    monkeypatch.setattr(Points, "__init__", watched_init)
    monkeypatch.setattr(points, "_spread", watched_spread)
    return found


class Logged(ToyAdapter):
    """Writes down which streams ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def streams(self, model, batch, *, published=False):
        for stream in super().streams(model, batch, published=published):

            def run(stream=stream):
                self.ran.append(stream.name)
                stream.run()

            yield replace(stream, run=run)


def rising_texts(count: int = 10) -> list[dict[str, torch.Tensor]]:
    """Batches whose texts get longer and longer: nobody can know from the first."""
    batches = toy_batches(count)
    for index, batch in enumerate(batches):
        length = 1 + index // 2
        for key in ("input_ids", "attention_mask"):
            batch[key] = batch[key][:, :1].repeat(1, length)
    return batches


@pytest.mark.parametrize("budget", [10**6, 60_000, 30_000, 15_000, LARGEST + WORK])
@pytest.mark.parametrize("batches", [toy_batches(10), rising_texts()], ids=["even", "rising"])
def test_points_are_the_same_and_never_exceed_the_budget(meter, budget, batches):
    _, found = measured(toy_model(), ToyAdapter(), batches, memory_budget=budget)
    expected = naive_points(toy_model(), ToyAdapter(), batches)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[site], points) for site, points in expected.items())
    assert 0 < meter.kept <= budget - WORK
    assert meter.peak <= budget
    assert not [points for points in meter.alive if points.count], "buffers are given back"


def test_the_dimension_is_the_same_whatever_the_budget():
    model, adapter = toy_model(), ToyAdapter()
    weights = WeightMap.of(model, adapter)
    batches = toy_batches(10)
    expected = measure(model, adapter, weights, batches, memory_budget=10**6)
    for budget in (30_000, LARGEST + WORK):
        found = measure(model, adapter, weights, batches, memory_budget=budget)
        for mine, other in zip(found.layers, expected.layers, strict=True):
            assert mine.dimension == pytest.approx(other.dimension, rel=1e-4)
    larger = [
        {key: torch.cat([batch[key] for batch in batches[i : i + 5]]) for key in batches[0]}
        for i in (0, 5)
    ]
    found = measure(model, adapter, weights, larger)
    for mine, other in zip(found.layers, expected.layers, strict=True):
        assert mine.dimension == pytest.approx(other.dimension, rel=1e-4)


def test_a_pass_does_not_run_streams_after_its_last_layer():
    adapter = Logged()
    calls: list[Any] = []
    measured(
        toy_model(), adapter, toy_batches(10), memory_budget=TWO_PASSES,
        progress=lambda *done: calls.append(done),
    )  # fmt: skip
    assert calls[-1] == (20, 20)
    # The first batch of the first pass runs everything, to find out what there is.
    first = ["vision", "text", "decoder"]
    assert adapter.ran[: len(first)] == first
    ran = {name: adapter.ran.count(name) for name in first}
    assert ran["vision"] == 20
    assert ran["text"] == 11
    assert ran["decoder"] == 11


def test_longer_texts_push_the_last_layers_into_a_later_pass():
    batches = rising_texts()
    model, adapter = toy_model(), ToyAdapter()
    weights = WeightMap.of(model, adapter)
    budget = 30_000
    planned = plan(model, adapter, weights, batches[0], SAMPLES, memory_budget=budget)
    calls: list[Any] = []
    measured(
        toy_model(), ToyAdapter(), batches, memory_budget=budget,
        progress=lambda *done: calls.append(done),
    )  # fmt: skip
    assert calls[-1][0] == calls[-1][1]
    assert calls[-1][0] > 10 * len(planned.passes)


@pytest.mark.parametrize("budget", [10**6, 40_000])
def test_a_loader_that_does_not_know_its_length_is_read_as_often_as_needed(meter, budget):
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return iter(toy_batches(40))

    _, found = measured(toy_model(), ToyAdapter(), Loader(), memory_budget=budget)
    expected = naive_points(toy_model(), ToyAdapter(), toy_batches(40))
    assert all(torch.equal(found[site], points) for site, points in expected.items())
    assert meter.kept <= budget - WORK
    assert meter.peak <= budget


def test_an_iterator_is_enough_if_everything_fits():
    _, found = measured(toy_model(), ToyAdapter(), iter(toy_batches(20)), memory_budget=10**6)
    expected = naive_points(toy_model(), ToyAdapter(), toy_batches(20))
    assert all(torch.equal(found[site], points) for site, points in expected.items())


def test_an_iterator_that_would_be_read_twice_is_refused_after_its_first_batch():
    adapter = Logged()
    with pytest.raises(DataError, match="an iterator.*read once.* 58.9 KiB"):
        measured(toy_model(), adapter, iter(toy_batches(10)), memory_budget=TWO_PASSES, limit=10)
    assert adapter.ran == ["vision", "text", "decoder"]


def test_a_layer_that_does_not_fit_is_told_with_what_to_do():
    with pytest.raises(UnsupportedError) as caught:
        measured(toy_model(), ToyAdapter(), toy_batches(10), memory_budget=LARGEST + WORK - 1)
    message = str(caught.value)
    assert "points of feed (weight 'text.feed', stream 'text') take 7.0 KiB" in message
    assert f"memory_budget={LARGEST + WORK}" in message
    assert "bfloat16" in message
    measured(
        toy_model(), ToyAdapter(), toy_batches(10), memory_budget=LARGEST // 2 + WORK,
        dtype=torch.bfloat16,
    )  # fmt: skip


def test_without_a_budget_most_of_what_is_free_is_used(monkeypatch):
    calls: list[Any] = []
    options = {"progress": lambda *done: calls.append(done)}
    monkeypatch.setattr("vlp_plugins.runtime.memory.free_ram", lambda: 10**6)
    measured(toy_model(), ToyAdapter(), toy_batches(10), **options)
    assert calls[-1] == (10, 10)
    monkeypatch.setattr("vlp_plugins.runtime.memory.free_ram", lambda: 40_000)
    measured(toy_model(), ToyAdapter(), toy_batches(10), **options)
    assert calls[-1] == (30, 30)


def test_the_batches_must_be_the_same_in_every_pass():
    class Shuffled:
        def __init__(self) -> None:
            self.seed = 0

        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[Any]:
            self.seed += 1
            return iter(toy_batches(10, seed=self.seed))

    with pytest.raises(DataError, match="batch 0 is not the one of the first pass"):
        measured(toy_model(), ToyAdapter(), Shuffled(), memory_budget=30_000)


def _held(found):
    return sum(each.held_bytes for each in found.passes)


def test_the_plan_says_what_will_be_done(meter):
    model, adapter = toy_model(), ToyAdapter()
    weights = WeightMap.of(model, adapter)
    batches = toy_batches(10)
    found = plan(model, adapter, weights, batches[0], SAMPLES, memory_budget=TWO_PASSES)
    _, points = measured(model, adapter, batches, memory_budget=TWO_PASSES)
    assert _held(found) == sum(p.nbytes for p in points.values())
    planned = [met.site for each in found.passes for met in each.layers]
    assert sorted(planned) == sorted(points)
    assert len(found.passes) == 2
    assert found.batches == 10
    assert [each.streams[-1] for each in found.passes] == ["vision", "decoder"]
    assert max(each.peak_bytes for each in found.passes) <= TWO_PASSES
    assert found.lines[0].startswith("points of 20 layers for 30 samples: 72.2 KiB; 2 passes over")
    assert len(found.lines) == 3
    half = plan(
        model, adapter, weights, batches[0], SAMPLES, memory_budget=TWO_PASSES, dtype=torch.bfloat16
    )
    assert _held(half) * 2 == _held(found)
    with pytest.raises(DataError, match="0 samples"):
        plan(model, adapter, weights, batches[0], 0)
