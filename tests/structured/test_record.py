"""What was kept, as a value: checked, composed, written as JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.structured.record import Kept, Record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ()}, "heads is empty"),
        ({"heads": (1, 0)}, "should ascend"),
        ({"heads": (0, 0)}, "should ascend"),
        ({"units": (-1, 0)}, "should ascend from 0"),
        ({"heads": (0,), "units": (0,)}, "not both"),
        ({"dims": ()}, "dims is empty"),
        ({"dims": ((0, 1), (0,))}, r"they keep \[1, 2\]"),
        ({"heads": (0, 1), "dims": ((0,),)}, "dims are of 1 heads, but 2"),
        ({"heads": (0.5, 1.5)}, "should be whole numbers"),
        ({"heads": (False, True)}, "a mask is no list"),
        ({"units": "01"}, "should be whole numbers"),
        ({"units": 3}, "should be whole numbers"),
    ],
)
def test_what_cannot_be_kept_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        Kept(**options)


@pytest.mark.parametrize("form", [list, range, np.array, torch.tensor])
def test_indices_may_come_as_any_sequence(form: Any) -> None:
    given = range(3) if form is range else form([0, 1, 2])
    kept = Kept(heads=given, dims=[given] * 3)
    assert kept == Kept(heads=(0, 1, 2), dims=((0, 1, 2),) * 3)
    assert hash(kept) == hash(Kept(heads=(0, 1, 2), dims=((0, 1, 2),) * 3))
    assert json.dumps(Record({"a": kept}).to_json())


def test_a_record_survives_json() -> None:
    record = Record(
        {
            "vision.0.attention": Kept(heads=(0, 2), dims=((1, 3), (0, 2))),
            "vision.0.mlp": Kept(units=(5, 7)),
            "text.0.self": Kept(),
        }
    )
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert dict(again) == dict(record)


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"a": []},
        {"a": {"head": [0]}},
        {"a": {"heads": "01"}},
        {"a": {"heads": [0.0]}},
        {"a": {"heads": [True]}},
        {"a": {"dims": 3}},
        {"a": {"dims": [3]}},
        {"a": {"units": [2, 1]}},
    ],
)
def test_foreign_json_is_refused(data: object) -> None:
    with pytest.raises(StructureError):
        Record.from_json(data)


def subset(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, size - 1), min_size=1).map(lambda each: tuple(sorted(each)))


def rows(kept: Kept, heads: int, size: int) -> list[list[int]]:
    """The dimensions that are left, by head, as numbers of the whole block."""
    names = [[head * size + dim for dim in range(size)] for head in range(heads)]
    chosen = [names[head] for head in (range(heads) if kept.heads is None else kept.heads)]
    if kept.dims is None:
        return chosen
    return [[head[d] for d in dims] for head, dims in zip(chosen, kept.dims, strict=True)]


@st.composite
def two_steps(draw: st.DrawFn) -> tuple[Kept, Kept, int, int]:
    heads, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    steps: list[Kept] = []
    left, narrow = heads, size
    for _ in range(2):
        chosen = draw(st.none() | subset(left))
        left = left if chosen is None else len(chosen)
        dims = None
        if draw(st.booleans()):
            width = draw(st.integers(1, narrow))
            choice = st.permutations(range(narrow)).map(lambda p: tuple(sorted(p[:width])))  # noqa: B023
            dims = tuple(draw(choice) for _ in range(left))
            narrow = width
        steps.append(Kept(heads=chosen, dims=dims))
    return steps[0], steps[1], heads, size


@given(two_steps())
def test_two_steps_keep_what_their_composition_keeps(steps: tuple[Kept, Kept, int, int]) -> None:
    first, second, heads, size = steps
    left = rows(first, heads, size)
    names = rows(second, len(left), len(left[0]))
    flat = [name for head in left for name in head]
    expected = [[flat[name] for name in head] for head in names]
    assert rows(first.then(second), heads, size) == expected


@given(subset(9), st.data())
def test_units_compose(first: tuple[int, ...], data: st.DataObject) -> None:
    second = data.draw(subset(len(first)))
    both = Record({"a": Kept(units=first)}).compose(Record({"a": Kept(units=second)}))
    assert both["a"].units == tuple(first[index] for index in second)


def test_blocks_of_either_step_are_in_the_composition() -> None:
    first = Record({"a": Kept(heads=(1, 2)), "b": Kept(units=(0,))})
    both = first.compose(Record({"a": Kept(heads=(1,)), "c": Kept(units=(4,))}))
    assert dict(both) == {"a": Kept(heads=(2,)), "b": Kept(units=(0,)), "c": Kept(units=(4,))}


def test_what_is_gone_cannot_be_kept() -> None:
    first = Record({"a": Kept(units=(3, 5))})
    with pytest.raises(StructureError, match="only 2 are left"):
        first.compose(Record({"a": Kept(units=(2,))}))


def test_records_of_two_adapters_do_not_compose() -> None:
    one = Record({"a": Kept(units=(0, 1))}, "clip")
    assert one.compose(Record({"a": Kept(units=(0,))})).adapter == "clip"
    with pytest.raises(StructureError, match="of adapter 'clip', and this one is of adapter 'sig"):
        one.compose(Record({"a": Kept(units=(0,))}, "siglip"))
