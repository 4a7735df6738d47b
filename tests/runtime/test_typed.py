"""What a file says is of the type that code relies on, or the value is named that is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypedDict

import pytest

from vlp_plugins.runtime.errors import first_line, shown
from vlp_plugins.runtime.untrusted import read_as


class Size(TypedDict):
    shape: list[int]
    kept: int


@dataclass(frozen=True)
class Part:
    name: str
    points: tuple[float, ...]
    pair: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    sizes: Mapping[str, Size]
    results: Mapping[int, float]
    target: float | dict[str, float] | None = None
    kind: Literal["a", "b"] = "a"
    done: bool = False
    more: dict[str, Any] = field(default_factory=dict)


WHOLE = Whole(
    (Part("x", (1.0, 2.5), (3, 4)),), {"w": {"shape": [2, 3], "kept": 5}}, {0: 1.0, 12: 2.0},
    {"vision": 0.5}, "b", True, {"any": [None, {"thing": 1}]},
)  # fmt: skip


def test_what_was_written_comes_back() -> None:
    content = json.loads(json.dumps(asdict(WHOLE)))
    assert read_as(Whole, {**content, "of another version": 1}, "it") == WHOLE
    few = {"parts": [], "sizes": {}, "results": {}}
    assert read_as(Whole, few, "it") == Whole((), {}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {}}, r"it.parts is {}, not a list"),
        ({"parts": [{"name": 1, "points": []}]}, r"it.parts\[0\].name is 1, not text"),
        ({"parts": [{"name": "x"}]}, r"it.parts\[0\] has no points"),
        ({"parts": [{"name": "x", "points": ["1"]}]}, r"points\[0\] is '1', not a number"),
        ({"parts": [{"name": "x", "points": [], "pair": [1]}]}, r"pair is \[1\], not a list of 2"),
        ({"sizes": {"w": {"shape": [2.5], "kept": 1}}}, r"shape\[0\] is 2.5, not a whole number"),
        ({"sizes": {"w": {"shape": [True], "kept": 1}}}, r"shape\[0\] is True, not a whole number"),
        ({"sizes": {"w": {"shape": [2**64], "kept": 1}}}, r"is 18446744073709551616, not a whole"),
        ({"results": {"self": 1}}, r"it.results has 'self', which is not a whole number"),
        ({"results": {"9" * 30: 1}}, r"which is not a whole number"),
        ({"results": {"0": 10**400}}, r"it.results.0 is 1000+\.\.\., not a number"),
        ({"target": "0.5"}, r"it.target is '0.5', not a number or a mapping or empty"),
        ({"kind": "c"}, r"it.kind is 'c', not one of 'a', 'b'"),
        ({"done": 1}, r"it.done is 1, not true or false"),
        ({"more": [1]}, r"it.more is \[1\], not a mapping"),
    ],
)
def test_the_value_that_is_not_as_expected_is_named(change, message) -> None:
    content = json.loads(json.dumps(asdict(WHOLE)))
    with pytest.raises(ValueError, match=message):
        read_as(Whole, content | change, "it")


def test_what_is_shown_of_a_value_or_a_reason_is_short() -> None:
    assert shown([1, "a"]) == "[1, 'a']"
    assert shown("x" * 100) == "'" + "x" * 79 + "..."
    assert shown(10**5000) == "a value of type int too long to write"
    loop: list[Any] = []
    for _ in range(100_000):
        loop = [loop]
    assert shown(loop) == "a value of type list too long to write"
    assert first_line(ValueError("one\ntwo")) == "one"
    assert len(first_line(ValueError("x" * 1000))) < 310
