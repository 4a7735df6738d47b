"""Exact thresholds over many tensors, against a stable sort of their concatenation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_plugins.scoring import threshold as thresholds
from vlp_plugins.scoring.threshold import Sampled, find_cuts, order_keys, spread

# Few distinct values, so that ties within and across tensors are common; signed zeros included.
values = st.lists(
    st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1e-38, 0.25, 0.25000003, 1.0, 7.0, 3e38]), max_size=30
)


def by_sorting(tensors, removal):
    joined = torch.cat(tensors) + 0.0
    keep = torch.ones(len(joined), dtype=torch.bool)
    keep[torch.sort(joined, stable=True).indices[:removal]] = False
    return keep


@given(lists=st.lists(values, min_size=1, max_size=4), fraction=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_cuts_equal_a_stable_sort_of_everything(lists, fraction):
    tensors = [torch.tensor(v, dtype=torch.float32) for v in lists]
    removal = int(fraction * sum(t.numel() for t in tensors))

    cuts = find_cuts({str(i): lambda t=t: t for i, t in enumerate(tensors)}, [removal])[0]

    masks = [cuts[str(i)].mask(t) for i, t in enumerate(tensors)]
    assert torch.equal(torch.cat(masks), by_sorting(tensors, removal))
    assert [c.remove for c in cuts.values()] == [int((~m).sum()) for m in masks]


def sampled(tensors):
    return {name: Sampled(t.numel(), lambda n, t=t: t[::n]) for name, t in tensors.items()}


@given(lists=st.lists(values, min_size=1, max_size=4), fraction=st.floats(0, 1), ties=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_guess_from_a_sample_changes_nothing(lists, fraction, ties):
    tensors = {str(i): torch.tensor(v, dtype=torch.float32) for i, v in enumerate(lists)}
    removal = int(fraction * sum(t.numel() for t in tensors.values()))
    sources = {name: lambda t=t: t for name, t in tensors.items()}

    plain = find_cuts(sources, [removal], all_ties=ties)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "SAMPLED_FROM", 1)
        guessed = find_cuts(sources, [removal], all_ties=ties, samples=sampled(tensors))[0]

    for name, tensor in tensors.items():
        assert guessed[name].remove == plain[name].remove
        assert torch.equal(guessed[name].mask(tensor), plain[name].mask(tensor))


def test_a_sample_saves_a_sweep_and_a_wrong_one_costs_only_time():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200_000, generator=generator)
    sweeps = []

    def source():
        sweeps.append(1)
        return scores

    expected = find_cuts({"a": lambda: scores}, [50_000, 150_000])
    right = find_cuts({"a": source}, [50_000, 150_000], samples=sampled({"a": scores}))
    assert len(sweeps) == 1
    misleading = Sampled(scores.numel(), lambda n: torch.zeros(100) + 9)
    wrong = find_cuts({"a": source}, [50_000, 150_000], samples={"a": misleading})

    assert right == wrong == expected


def test_zeros_of_a_model_pruned_before_are_counted_and_not_picked(monkeypatch):
    scores = torch.rand(300_000, generator=torch.Generator().manual_seed(0))
    scores[::2] = 0
    removals = [90_000, 149_999, 150_000, 150_001, 180_000]
    picked = []
    compress = np.compress

    def counting(chosen, values):
        picked.append(int(chosen.sum()))
        return compress(chosen, values)

    expected = find_cuts({"a": lambda: scores}, removals)
    monkeypatch.setattr(thresholds.np, "compress", counting)
    found = find_cuts({"a": lambda: scores}, removals, samples=sampled({"a": scores}))

    assert found == expected
    assert sum(picked) < 0.2 * len(removals) * scores.numel()


def test_the_stride_of_a_sample_meets_every_column():
    for stride in (144, 768, 30, 1, 2):
        assert math.gcd(spread(stride), 2 * 3 * 5 * 7) == 1
        assert spread(stride) >= stride


def test_several_cuts_come_from_the_same_two_sweeps():
    sweeps = 0
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))

    def source():
        nonlocal sweeps
        sweeps += 1
        return scores

    # 0.5 and 0.5001 fall into one bucket of the first sweep.
    cuts = find_cuts({"a": source}, [0, 500, 501, 1000])

    assert [c["a"].remove for c in cuts] == [0, 500, 501, 1000]
    assert sweeps <= 3


def test_all_ties_removes_every_element_equal_to_the_threshold():
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])

    exact, published = (
        find_cuts({"a": lambda: scores}, [2], all_ties=ties)[0]["a"] for ties in (False, True)
    )

    assert exact.mask(scores).tolist() == [False, False, True, True, True]
    assert published.mask(scores).tolist() == [False, False, False, False, True]
    assert (exact.remove, published.remove) == (2, 4)


def test_keys_have_the_order_of_the_scores():
    scores = torch.tensor([-math.inf, -3.0, -1e-45, -0.0, 0.0, 1e-45, 2.0, math.inf])
    keys = order_keys(scores)

    assert torch.equal(keys.sort().values, keys)
    assert keys[3] == keys[4]


def test_more_than_everything_cannot_be_removed():
    with pytest.raises(ValueError, match="cannot remove 3 of 2"):
        find_cuts({"a": lambda: torch.ones(2)}, [3])
