"""Questions about a scene, and what ten people would answer.

The ten agree on the facts but not on the words: where a colour or a place has two names, everyone
takes one at random. So an answer that four or more gave is fully right, a rarer one partly, as
VQA's accuracy has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.demo.captions import COLOURS, DIGITS
from benchmarks.demo.language import Fact
from benchmarks.papers.downstream.wording import CELLS

PEOPLE = 10
NEW_WORDS = ("what", "which", "where", "how", "many", "are", "colour", "digit", "digits", "yes",
             "no", "?")  # fmt: skip
"""Words of questions and answers that captions do not have."""

ANSWERS: tuple[str, ...] = (
    "yes",
    "no",
    *DIGITS,
    *(name for names in COLOURS for name in names),
    *(name for names in CELLS for name in names),
)
"""Everything that may be answered."""


@dataclass(frozen=True)
class Question:
    """A question about one image.

    Attributes:
        kind: what is asked for: `colour`, `digit`, `place`, `count` or `presence`.
        text: the question.
        answers: what each of ten people said.
    """

    kind: str
    text: str
    answers: tuple[str, ...]


_Asked = tuple[str, tuple[str, ...]]
"""The question, and synonyms of the right answer."""


def ask(
    facts: frozenset[Fact], rng: np.random.Generator, kinds: tuple[str, ...] | None = None
) -> Question:
    """A random question that has one right answer; every kind is equally likely.

    Args:
        facts: what the scene shows.
        rng: source of every random choice.
        kinds: to choose among; None for all of `KINDS`.

    Raises:
        ValueError: if the scene allows no question of these kinds.
    """
    names = list(_MAKERS if kinds is None else kinds)
    objects = sorted(facts)
    for number in rng.permutation(len(names)):
        possible = list(_MAKERS[names[number]](objects, rng))
        if possible:
            text, synonyms = possible[rng.integers(len(possible))]
            said = (synonyms[rng.integers(len(synonyms))] for _ in range(PEOPLE))
            return Question(names[number], text, tuple(said))
    raise ValueError(f"no question of the kinds {', '.join(names)} fits a scene of {len(objects)}")


def _colour(objects: list[Fact], rng: np.random.Generator) -> Iterator[_Asked]:
    for thing in objects:
        answer = COLOURS[thing.colour]
        yield f"what colour is the digit at the {_name(CELLS[thing.cell], rng)} ?", answer
        if _is_only(objects, digit=thing.digit):
            yield f"what colour is the {DIGITS[thing.digit]} ?", answer


def _digit(objects: list[Fact], rng: np.random.Generator) -> Iterator[_Asked]:
    for thing in objects:
        answer = (DIGITS[thing.digit],)
        yield f"what digit is at the {_name(CELLS[thing.cell], rng)} ?", answer
        if _is_only(objects, colour=thing.colour):
            yield f"which digit is {_name(COLOURS[thing.colour], rng)} ?", answer


def _place(objects: list[Fact], rng: np.random.Generator) -> Iterator[_Asked]:
    for thing in objects:
        if _is_only(objects, digit=thing.digit):
            yield f"where is the {DIGITS[thing.digit]} ?", CELLS[thing.cell]
        if _is_only(objects, colour=thing.colour):
            yield f"where is the {_name(COLOURS[thing.colour], rng)} digit ?", CELLS[thing.cell]


def _count(objects: list[Fact], rng: np.random.Generator) -> Iterator[_Asked]:
    yield "how many digits are there ?", (DIGITS[len(objects)],)
    absent = sorted(set(range(len(COLOURS))) - {thing.colour for thing in objects})
    for colour in [thing.colour for thing in objects] + [int(rng.choice(absent))]:
        number = sum(thing.colour == colour for thing in objects)
        yield f"how many digits are {_name(COLOURS[colour], rng)} ?", (DIGITS[number],)


def _presence(objects: list[Fact], rng: np.random.Generator) -> Iterator[_Asked]:
    """As often yes as no; what is not there has the colour or the digit of something that is."""
    there = {thing[:2] for thing in objects}
    thing = objects[rng.integers(len(objects))]
    colour, digit = thing.colour, thing.digit
    if rng.integers(2):
        while (colour, digit) in there:
            colour, digit = thing.colour, thing.digit
            if rng.integers(2):
                colour = int(rng.integers(len(COLOURS)))
            else:
                digit = int(rng.integers(len(DIGITS)))
    answer = "yes" if (colour, digit) in there else "no"
    yield f"is there a {_name(COLOURS[colour], rng)} {DIGITS[digit]} ?", (answer,)


_MAKERS: dict[str, Callable[[list[Fact], np.random.Generator], Iterator[_Asked]]] = {
    "colour": _colour,
    "digit": _digit,
    "place": _place,
    "count": _count,
    "presence": _presence,
}
KINDS = tuple(_MAKERS)


def _name(names: tuple[str, ...], rng: np.random.Generator) -> str:
    return names[rng.integers(len(names))]


def _is_only(objects: list[Fact], *, colour: int | None = None, digit: int | None = None) -> bool:
    """Whether exactly one object has this colour, or this digit."""
    return sum(thing.colour == colour or thing.digit == digit for thing in objects) == 1
