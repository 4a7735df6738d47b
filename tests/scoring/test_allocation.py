"""Allocations: exact counts over their scope, floors, patterns, ties by position."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import NonFiniteError, SparsityError
from vlp_plugins.scoring.allocation import (
    GlobalAllocation,
    LayerAllocation,
    ModalityAllocation,
    Pattern,
    RowAllocation,
    allocation_by_name,
)
from vlp_plugins.scoring.lamp import Lamp
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.score import Evidence
from vlp_plugins.scoring.selection import Scored, keep_largest_of_rows


def scored(tensors, scorer=None):
    """`{"vision.a": tensor}`: the modality is the first part of the name."""
    weights = {
        name: Weight(name, name.split(".")[0], 0, torch.nn.Parameter(tensor), (), (name,))
        for name, tensor in tensors.items()
    }
    return Scored(scorer or Magnitude(), weights, {name: Evidence(name) for name in tensors})


def removed(scored, selections):
    ranked = scored.ranking()
    masks = {name: s.mask(ranked.scores(name)) for name, s in selections.items()}
    counts = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert counts == {name: s.remove for name, s in selections.items()}
    return counts


def towers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "vision.a": torch.randn(10, 12, generator=generator),
        "vision.b": torch.randn(6, 8, generator=generator) * 3,
        "text.a": torch.randn(9, 4, generator=generator) * 0.01,
    }


@given(sparsity=st.floats(0, 0.999), lamp=st.booleans())
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_over_the_scope_of_the_allocation(sparsity, lamp):
    problem = scored(towers(), Lamp() if lamp else None)

    overall = removed(problem, GlobalAllocation().select(problem, [sparsity])[0])
    assert sum(overall.values()) == int(sparsity * 204)

    modal = removed(problem, ModalityAllocation().select(problem, [sparsity])[0])
    assert modal["vision.a"] + modal["vision.b"] == int(sparsity * 168)
    assert modal["text.a"] == int(sparsity * 36)

    layered = removed(problem, LayerAllocation().select(problem, [sparsity])[0])
    assert layered == {"vision.a": int(sparsity * 120), "vision.b": int(sparsity * 48),
                       "text.a": int(sparsity * 36)}  # fmt: skip


def test_global_allocation_empties_a_tensor_of_small_weights_and_modality_wise_does_not():
    problem = scored(towers())

    assert removed(problem, GlobalAllocation().select(problem, [0.75])[0])["text.a"] == 36
    assert removed(problem, ModalityAllocation().select(problem, [0.75])[0])["text.a"] == 27


def test_a_floor_keeps_every_tensor_alive_at_the_same_total():
    problem = scored(towers())

    counts = removed(problem, GlobalAllocation().select(problem, [0.75], floor=0.1)[0])

    assert sum(counts.values()) == int(0.75 * 204)
    assert counts["text.a"] == int(0.9 * 36)
    with pytest.raises(SparsityError, match="153 of 204 elements shall go.*lets at most 102 go"):
        GlobalAllocation().select(problem, [0.75], floor=0.5)


def test_a_floor_counts_elements_and_not_fractions():
    """1 - 0.9 is a little less than 0.1 in floating point; 9 of 10 may go all the same."""
    problem = scored({"vision.a": torch.randn(4, 10)})

    assert removed(problem, RowAllocation().select(problem, [0.9], floor=0.1)[0])["vision.a"] == 36
    assert removed(problem, GlobalAllocation().select(problem, [0.9], floor=0.1)[0]) == {
        "vision.a": 36
    }


@pytest.mark.parametrize(
    ("allocation", "target"), [(RowAllocation(), 0.9), (Pattern(keep=1, of=4), 0.75)]
)
def test_rows_and_patterns_that_break_a_floor_are_refused(allocation, target):
    with pytest.raises(SparsityError, match=r"'vision.a' would lose .* floor of 0.5"):
        allocation.select(scored(towers()), [target], floor=0.5)


@pytest.mark.parametrize("floor", [-1, 1, 7])
@pytest.mark.parametrize("allocation", [GlobalAllocation(), RowAllocation(), LayerAllocation()])
def test_a_floor_outside_its_range_is_refused(allocation, floor):
    with pytest.raises(SparsityError, match=r"in \[0, 1\)"):
        allocation.select(scored(towers()), [0.5], floor=floor)


def test_the_published_variant_has_no_floor():
    problem = replace(scored(towers()), published=True)
    with pytest.raises(SparsityError, match="published methods have no floor"):
        GlobalAllocation().select(problem, [0.85], floor=0.1)


def test_budgets_per_modality():
    problem = scored(towers())

    counts = removed(
        problem, ModalityAllocation().select(problem, [{"vision": 0.5, "text": 0.25}])[0]
    )

    assert (counts["vision.a"] + counts["vision.b"], counts["text.a"]) == (84, 9)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (75, "did you mean 0.75"),
        (1.0, "not 1$"),
        ("0.75", "is not a sparsity; give a number"),
        (None, "is not a sparsity"),
        (-0.1, "lies in"),
        ({"vision": 0.5}, "no budget for modality 'text'"),
        ({"vison": 0.5, "text": 0.5}, "did you mean 'vision'"),
    ],
)
def test_bad_targets_say_what_to_do(target, message):
    with pytest.raises(SparsityError, match=message):
        ModalityAllocation().select(scored(towers()), [target])


def test_global_allocation_takes_no_budgets():
    with pytest.raises(SparsityError, match="allocation='modality'"):
        GlobalAllocation().select(scored(towers()), [{"vision": 0.5, "text": 0.5}])


def test_rows_lose_equally_many():
    problem = scored(towers())
    selection = RowAllocation().select(problem, [0.5])[0]

    assert (~selection["vision.a"].mask(problem.scores("vision.a"))).sum(1).tolist() == [6] * 10
    assert removed(problem, selection)["text.a"] == 18


def test_pattern_keeps_two_of_four_consecutive_inputs():
    problem = scored(towers())
    pattern = Pattern(keep=2, of=4)

    selection = pattern.select(problem, [pattern.sparsity])[0]
    mask = selection["vision.a"].mask(problem.scores("vision.a"))

    assert mask.view(-1, 4).sum(1).tolist() == [2] * 30
    assert removed(problem, selection) == {"vision.a": 60, "vision.b": 24, "text.a": 18}
    assert allocation_by_name("keep=2,of=4") == pattern
    with pytest.raises(SparsityError, match="makes sparsity 0.5, not 0.75"):
        pattern.select(problem, [0.75])
    with pytest.raises(SparsityError, match="does not divide the 12 inputs"):
        Pattern(keep=2, of=5).select(problem, [0.6])


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5),
    keep=st.integers(0, 6),
)
@settings(max_examples=80, deadline=None)
def test_ties_in_a_row_go_by_position(rows, keep):
    scores = torch.tensor(rows, dtype=torch.float32)
    order = torch.sort(scores, dim=1, stable=True).indices
    expected = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, : 6 - keep], False)

    assert torch.equal(keep_largest_of_rows(scores, keep), expected)


def test_a_score_of_nan_names_the_weight():
    tensors = towers()
    tensors["text.a"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="weight 'text.a'"):
        GlobalAllocation().select(scored(tensors), [0.5])


def test_an_unknown_allocation_suggests_the_nearest():
    with pytest.raises(SparsityError, match="did you mean 'modality'"):
        allocation_by_name("modalty")
