"""Parameters whose names Python keeps for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Optional

import numpy as np
import pytest

from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.registry import Offer, make
from vlp_plugins.runtime.errors import UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    from somewhere import Unknown  # type: ignore[import-not-found]


def offer(factory):
    return Offer("methods", "mine", factory, "mine", "mine", builtin=False)


def with_lambda(*, lambda_=0.1, size):
    return {"lambda": lambda_, "size": size}


def test_lambda_may_be_written_with_and_without_the_underscore():
    for name in ("lambda", "lambda_"):
        made = make(offer(with_lambda), {name: 2, "size": 1}, dict)

        assert made == {"lambda": 2, "size": 1}


def test_messages_list_the_name_that_users_write():
    with pytest.raises(UnknownNameError, match=r"no parameter 'lamda'; it takes lambda, size"):
        make(offer(with_lambda), {"lamda": 2}, dict)
    with pytest.raises(UnsupportedError, match="needs a value for size; it takes lambda, size"):
        make(offer(with_lambda), {"lambda": 2}, dict)
    with pytest.raises(UnsupportedError, match="'lambda' twice"):
        make(offer(with_lambda), {"lambda": 2, "lambda_": 3, "size": 1}, dict)


def test_a_factory_that_takes_anything_gets_the_name_as_it_is():
    assert make(offer(lambda **given: given), {"lambda": 2}, dict) == {"lambda": 2}


Rounds = int | Literal["auto"]


def with_numbers(
    *,
    rounds: int = 1,
    limit: int | None = None,
    every: Optional[int] = None,  # noqa: UP045
    named: Rounds = "auto",
    share: float = 0.5,
    either: int | float = 1,
    anything: Any = None,
    sizes: list[int] | None = None,
    bare=None,
) -> dict[str, Any]:
    return dict(locals())


def with_an_unknown_name(*, rounds: int | None = None, other: Unknown | None = None):
    return {"rounds": rounds, "other": other}


@pytest.mark.parametrize("name", ["rounds", "limit", "every", "named"])
def test_where_a_whole_number_is_wanted_three_point_nought_is_three(name) -> None:
    for given in (3, 3.0, np.float64(3.0), np.int64(3)):
        found = make(offer(with_numbers), {name: given}, dict)[name]
        assert (found, type(found)) == (3, int)
    for wrong in (3.7, -0.5, float("nan"), float("inf")):
        with pytest.raises(UnsupportedError, match=f"{name}={wrong!r}; give a whole number"):
            make(offer(with_numbers), {name: wrong}, dict)


@pytest.mark.parametrize("name", ["rounds", "limit", "every"])
def test_text_is_no_whole_number(name) -> None:
    with pytest.raises(UnsupportedError, match=f"{name}='8'; give a whole number"):
        make(offer(with_numbers), {name: "8"}, dict)


@pytest.mark.parametrize("name", ["share", "either", "anything", "bare", "sizes"])
def test_other_numbers_stay_as_they_are(name) -> None:
    for given in (3.0, 3.7):
        found = make(offer(with_numbers), {name: given}, dict)[name]
        assert (found, type(found)) == (given, float)
    assert make(offer(with_numbers), {"rounds": None, "named": "auto"}, dict)["named"] == "auto"


def test_an_annotation_that_does_not_resolve_is_read_as_text() -> None:
    assert type(make(offer(with_an_unknown_name), {"rounds": 3.0}, dict)["rounds"]) is int
    with pytest.raises(UnsupportedError, match="rounds=3.7; give a whole number"):
        make(offer(with_an_unknown_name), {"rounds": 3.7}, dict)


@pytest.mark.parametrize(
    ("method", "parameter"),
    [
        ("itersnip", "rounds"),
        ("itersnip", "batches_per_round"),
        ("chita", "rows"),
        ("chita", "block_size"),
        ("chita++", "rounds"),
        ("tamt", "steps"),
        ("taylor", "every"),
        ("platon", "steps"),
    ],
)
def test_whole_numbers_of_our_methods(method, parameter) -> None:
    three = make_method(registry(), method, **{parameter: 3.0})
    assert three.parameters[parameter] == 3
    assert type(three.parameters[parameter]) is int
    with pytest.raises(UnsupportedError, match=f"{parameter}=3.7; give a whole number"):
        make_method(registry(), method, **{parameter: 3.7})
