"""gather() and split_half(): the data pass by itself."""

from __future__ import annotations

import pytest
import torch
from toy import Toy, ToyAdapter, toy_batches, toy_model

from vlp_plugins.calibration.batches import interleave
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.pruning import gather, prune, split_half
from vlp_plugins.runtime.errors import StatisticsError, UnsupportedError


@pytest.fixture(scope="module")
def model() -> Toy:
    return toy_model()


@pytest.fixture(scope="module")
def statistics(model: Toy) -> Statistics:
    return gather(model, toy_batches(4), adapter=ToyAdapter())


def test_statistics_replace_the_batches(model, statistics):
    options = {"adapter": ToyAdapter(), "sparsity": [0.5, 0.75]}
    assert prune(model, statistics=statistics, **options) == prune(model, toy_batches(4), **options)


def test_an_adapter_may_be_named_and_options_of_the_pass_given():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    one, two = ([torch.full((2, 4), value)] * 3 for value in (1.0, 2.0))
    seen: list[int] = []
    statistics = gather(
        model,
        interleave(one, two),
        method="wanda",
        adapter="module",
        limit=4,
        progress=lambda done, _: seen.append(done),
    )
    assert statistics.samples == (4, 4)
    assert seen == [1, 2, 3, 4]
    assert statistics.mean("input_second_moment", "0").tolist() == [2.5] * 4


def test_statistics_of_one_variant_are_refused_for_the_other(model):
    published = gather(model, toy_batches(2), adapter=ToyAdapter(), variant="published")
    options = {"adapter": ToyAdapter(), "sparsity": 0.5, "statistics": published}
    assert prune(model, variant="published", **options)
    with pytest.raises(StatisticsError, match="variant='published'"):
        prune(model, **options)


def test_halves_that_saw_the_same_agree_and_others_less(model, statistics):
    batch = toy_batches(1)
    options = {"adapter": ToyAdapter(), "sparsity": 0.5}
    same = split_half(model, gather(model, batch * 2, adapter=ToyAdapter()), **options)
    other = split_half(model, statistics, **options)
    assert list(same) == list(other) == ["vision", "text", "all"]
    assert all(overlap.agreement == 1 for overlap in same.values())
    assert other["all"].agreement < 1
    assert other["all"] == other["vision"] + other["text"]


def test_split_half_is_the_comparison_of_masks_from_every_other_batch(model, statistics):
    batches = toy_batches(4)
    even, odd = (
        prune(model, half, adapter=ToyAdapter(), sparsity=0.6)
        for half in (batches[::2], batches[1::2])
    )
    found = split_half(model, statistics, adapter=ToyAdapter(), sparsity=0.6)
    assert found == even.compare(odd)


def test_what_cannot_be_gathered_or_compared_is_said(model, statistics):
    toy = {"adapter": ToyAdapter()}
    with pytest.raises(UnsupportedError, match="'omp' reads no data"):
        gather(model, toy_batches(2), method="omp", **toy)
    with pytest.raises(UnsupportedError, match="'omp' reads no data"):
        split_half(model, statistics, method="omp", sparsity=0.5, **toy)
    with pytest.raises(UnsupportedError, match="one sparsity at a time"):
        split_half(model, statistics, sparsity=[0.5, 0.6], **toy)
    with pytest.raises(StatisticsError, match="use at least 2 batches"):
        split_half(model, gather(model, toy_batches(1), **toy), sparsity=0.5, **toy)


def test_pruning_works_in_inference_mode(model):
    options = {"adapter": ToyAdapter(), "sparsity": 0.5}
    expected = prune(model, toy_batches(2), **options)
    with torch.inference_mode():
        masks = prune(model, toy_batches(2), **options)
    assert masks == expected
    pruned = toy_model()
    masks.apply(pruned, adapter=ToyAdapter())
    assert masks.verify(pruned, adapter=ToyAdapter()) == []
