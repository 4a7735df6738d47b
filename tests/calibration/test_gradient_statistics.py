"""Mean gradients: gathered in the same pass as activations, kept, resumed, used by SNIP."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from toy import Counting, toy_batches
from toy_loss import LosingAdapter, losing_toy, spoilt

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.calibration.moments import (
    INPUT_SECOND_MOMENT,
    MEAN_GRADIENT,
    InputSecondMoment,
    MeanGradient,
)
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.calibration.sums import LargeSums
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import gather, prune, split_half
from vlp_plugins.runtime.errors import DataError, NonFiniteError, StatisticsError

BATCHES = 5


def run(batches: Any, statistics: Any = None, **options: Any) -> Statistics:
    model, adapter = losing_toy(), LosingAdapter()
    needs = statistics or [MeanGradient()]
    return calibrate(model, adapter, WeightMap.of(model, adapter), batches, needs, **options)


def rows_of(batches: Any) -> list[dict[str, torch.Tensor]]:
    model, adapter = losing_toy(), LosingAdapter()
    probe = LossProbe(model, adapter, WeightMap.of(model, adapter))
    with probe.attached():
        return [
            {name: gradient.double() for name, gradient in (probe.measure(batch, i) or {}).items()}
            for i, batch in enumerate(batches)
        ]


def same_bits(a: Statistics, b: Statistics) -> bool:
    fields = ("samples", "batches", "counted", "fingerprint", "structure")
    return all(getattr(a, field) == getattr(b, field) for field in fields) and (
        a.sums.keys() == b.sums.keys() and all(torch.equal(a.sums[k], b.sums[k]) for k in a.sums)
    )


@pytest.fixture(scope="module")
def uneven() -> list[dict[str, torch.Tensor]]:
    """Batches of different sizes, which count alike."""
    return [*toy_batches(3), *toy_batches(2, size=5, seed=1)]


@pytest.mark.parametrize("half", [None, 0, 1])
def test_it_is_the_mean_over_batches_whatever_their_size(uneven, half):
    statistics = run(uneven)
    rows = rows_of(uneven)[slice(None) if half is None else slice(half, None, 2)]
    for name in rows[0]:
        expected = (sum(row[name] for row in rows) / len(rows)).flatten()
        found = statistics.mean(MEAN_GRADIENT, name, half=half)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)


def test_one_pass_gathers_both_kinds_and_runs_each_probe_once_per_batch():
    alone, together = Counting(), Counting()
    activations = run(toy_batches(BATCHES), [alone])
    gradients = run(toy_batches(BATCHES))

    calls: list[int] = []

    class Counted(MeanGradient):
        def measure(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
            assert gradient.shape == weight.shape
            calls.append(gradient.numel())
            return super().measure(weight, gradient)

    both = run(toy_batches(BATCHES), [Counted(), together])

    assert together.tokens == alone.tokens
    assert len(calls) == BATCHES * len(both.shapes)
    for part in (activations, gradients):
        assert part.sums
        assert all(torch.equal(value, both.sums[key]) for key, value in part.sums.items())
    assert len(both.sums) == len(activations.sums) + len(gradients.sums)


def test_gradients_alone_run_no_stream(monkeypatch):
    def no_streams(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError

    monkeypatch.setattr(LosingAdapter, "streams", no_streams)
    assert run(toy_batches(2)).names() == {MEAN_GRADIENT}


def test_batches_that_are_not_finite_count_in_no_mean(caplog):
    batches = toy_batches(BATCHES)
    batches[1] = spoilt(batches[1])
    with pytest.raises(NonFiniteError, match="batch 1"):
        run(batches)
    with caplog.at_level(logging.WARNING, "vlp_plugins.calibration"):
        found = run(batches, [MeanGradient(), InputSecondMoment()], skip_nonfinite=True)
    assert "skipped batch 1" in caplog.text

    good = [batches[0], *batches[2:]]
    expected = run(good, [MeanGradient(), InputSecondMoment()])
    assert found.counted == (3, 1)
    assert found.samples == (9, 3)
    assert found.batches == BATCHES
    for name in found.shapes:
        for statistic in (MEAN_GRADIENT, INPUT_SECOND_MOMENT):
            mine, wanted = found.mean(statistic, name), expected.mean(statistic, name)
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=0)


def test_activations_that_are_not_finite_can_be_skipped_without_any_loss():
    batches = toy_batches(3)
    batches[0] = spoilt(batches[0])
    found = run(batches, [InputSecondMoment()], skip_nonfinite=True)
    assert found.counted == (1, 1)
    expected = run(batches[1:], [InputSecondMoment()])
    for name in found.shapes:
        mine = found.mean(INPUT_SECOND_MOMENT, name)
        assert torch.equal(mine, expected.mean(INPUT_SECOND_MOMENT, name))


def test_a_pass_without_a_single_good_batch_fails():
    with pytest.raises(NonFiniteError, match="all 2 batches were left out"):
        run([spoilt(batch) for batch in toy_batches(2)], skip_nonfinite=True)
    with pytest.raises(DataError, match="empty"):
        run([])


def test_a_weight_that_the_loss_never_reaches_is_named():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    adapter = ModuleAdapter(model, loss=lambda m, batch: m["used"](batch).sum())
    weights = WeightMap.of(model, adapter)
    with pytest.raises(StatisticsError, match="does not depend on weight 'idle' at idle"):
        calibrate(model, adapter, weights, [torch.ones(2, 3)], [MeanGradient()])


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("skip", [False, True])
def test_an_interrupted_pass_resumes_to_the_same_bits(tmp_path, after, skip):
    path = tmp_path / "pass.ckpt"
    needs = [MeanGradient(), InputSecondMoment()]
    batches = toy_batches(BATCHES)
    if skip:
        batches[0] = spoilt(batches[0])

    def broken() -> Iterator[Any]:
        yield from batches[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken(), needs, checkpoint=path, skip_nonfinite=skip)
    resumed = run(batches, needs, checkpoint=path, resume=True, skip_nonfinite=skip)
    assert same_bits(resumed, run(batches, needs, skip_nonfinite=skip))


def test_sums_that_were_caught_half_changed_are_never_written(tmp_path, monkeypatch, caplog):
    path = tmp_path / "pass.ckpt"
    whole, calls = LargeSums.add, []
    weights = len(run(toy_batches(1)).sums)

    def add(self: LargeSums, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3 * weights + 7:  # in the middle of the fourth batch
            raise KeyboardInterrupt
        whole(self, *arguments)

    monkeypatch.setattr(LargeSums, "add", add)
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        run(toy_batches(BATCHES), checkpoint=path, checkpoint_every=2)
    monkeypatch.setattr(LargeSums, "add", whole)
    assert "holds the first 2 batches" in caplog.text
    resumed = run(toy_batches(BATCHES), checkpoint=path, resume=True)
    assert same_bits(resumed, run(toy_batches(BATCHES)))


def test_a_pass_in_another_precision_is_not_resumed(tmp_path):
    path = tmp_path / "pass.ckpt"
    run(toy_batches(2), checkpoint=path, autocast=torch.bfloat16)
    with pytest.raises(StatisticsError, match=r"its autocast is 'torch.bfloat16'"):
        run(toy_batches(3), checkpoint=path, resume=True)


def test_statistics_keep_what_was_counted(tmp_path):
    batches = [spoilt(toy_batches(1)[0]), *toy_batches(3)]
    found = run(batches, skip_nonfinite=True)
    found.save(tmp_path / "statistics.safetensors")
    assert same_bits(Statistics.load(tmp_path / "statistics.safetensors"), found)
    assert found.counted == (1, 2)


def test_snip_removes_what_changes_the_loss_least():
    model, adapter = losing_toy(), LosingAdapter()
    batches = toy_batches(BATCHES)
    masks = prune(model, batches, method="snip", adapter=adapter, sparsity=[0.5, 0.9])

    rows = rows_of(batches)
    weights = WeightMap.of(model, adapter)
    scores = {
        name: (sum(row[name] for row in rows) / BATCHES * weights[name].parameter.detach()).abs()
        for name in weights
    }
    joined = torch.cat([score.flatten() for score in scores.values()])
    for sparsity, mask in zip((0.5, 0.9), masks, strict=True):
        removed = int(sparsity * len(joined))
        assert mask.removed == removed
        cut = joined.kthvalue(removed).values
        kept = torch.cat([mask[name].flatten() for name in scores])
        assert torch.equal(kept, joined > cut)


def test_snip_never_keeps_a_zero_weight_in_place_of_another():
    model, adapter = losing_toy(), LosingAdapter()
    with torch.no_grad():
        model.encoder_out.weight[:, ::2] = 0
    masks = prune(model, toy_batches(2), method="snip", adapter=adapter, sparsity=0.5)
    assert not masks["text.out_proj"][:, ::2].any()


def test_statistics_of_one_pass_serve_every_sparsity_and_tell_if_data_was_enough():
    model, adapter = losing_toy(), LosingAdapter()
    batches = toy_batches(BATCHES)
    statistics = gather(
        model, batches, method="snip", adapter=adapter, autocast="bfloat16", skip_nonfinite=True
    )
    assert statistics.mean(MEAN_GRADIENT, "text.q").isfinite().all()
    statistics = gather(model, batches, method="snip", adapter=adapter)
    mask = prune(model, statistics=statistics, method="snip", adapter=adapter, sparsity=0.75)
    assert mask == prune(model, batches, method="snip", adapter=adapter, sparsity=0.75)
    halves = split_half(model, statistics, method="snip", adapter=adapter, sparsity=0.75)
    assert 0.5 < halves["all"].agreement < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [False, True])
def test_gradients_go_as_soon_as_they_are_added(dtype: torch.dtype, skip: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).to(dtype)
    adapter = ModuleAdapter(model, loss=lambda model, batch: model(batch).float().square().mean())
    weights = WeightMap.of(model, adapter)
    probe = LossProbe(model, adapter, weights, skip_nonfinite=skip)
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def take(name: str, gradient: torch.Tensor) -> None:
        seen.append(weakref.ref(gradient))
        alive.append(sum(each() is not None for each in seen))

    with probe.attached():
        probe.hand_over(torch.randn(4, 8, dtype=dtype), 0, take)
    # Where a batch may turn out not to count, all of its gradients are kept until that is known.
    assert alive == ([1, 2, 3, 4, 5, 6] if skip else [1] * 6)


def test_sums_take_8_bytes_for_each_weight_unless_halves_are_asked_for(tmp_path) -> None:
    model, adapter, batches = losing_toy(), LosingAdapter(), toy_batches(BATCHES)
    weights = WeightMap.of(model, adapter)
    together = run(batches, halves=False)
    apart = run(batches)
    taken = [
        sum(total.numel() * total.element_size() for total in each.sums.values())
        for each in (together, apart)
    ]
    assert taken == [8 * weights.numel, 16 * weights.numel]
    for name in weights:
        one, other = (each.mean(MEAN_GRADIENT, name) for each in (together, apart))
        assert torch.equal(one, other)
    with pytest.raises(StatisticsError, match="of all batches together.*`gather` keeps"):
        together.mean(MEAN_GRADIENT, next(iter(weights)), half=0)
    together.save(tmp_path / "together.safetensors")
    assert same_bits(Statistics.load(tmp_path / "together.safetensors"), together)

    path = tmp_path / "pass.ckpt"
    run(batches[:2], halves=False, checkpoint=path)
    assert same_bits(run(batches, halves=False, checkpoint=path, resume=True), together)
    with pytest.raises(StatisticsError, match="sums"):
        run(batches, checkpoint=path, resume=True)


def test_gradients_given_away_are_those_of_measure() -> None:
    model, adapter, batches = losing_toy(), LosingAdapter(), toy_batches(2)
    probe = LossProbe(model, adapter, WeightMap.of(model, adapter))
    given: list[dict[str, torch.Tensor]] = [{}, {}]
    with probe.attached():  # the loss has a state, which starts again
        for index, batch in enumerate(batches):
            assert probe.hand_over(batch, index, given[index].__setitem__)
    for found, expected in zip(given, rows_of(batches), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].double(), expected[name]) for name in expected)
