"""Captions of the scenes: varied wording out, checked truth in.

A caption names colour, digit and position of every object, in one of several sentence patterns
and with synonyms. `parse` is the inverse: it recovers the facts from any wording that `write`
can produce, and says None when a sentence does not state facts, so that "is this generated
caption fully right?" has an exact answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

COLOURS: tuple[tuple[str, ...], ...] = (
    ("red",),
    ("green",),
    ("blue",),
    ("yellow",),
    ("pink", "magenta"),
    ("cyan", "turquoise"),
    ("white",),
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Row by row from the top left; every cell of the 3x3 grid has two names.
CELLS: tuple[tuple[str, str], ...] = (
    ("top left", "upper left"),
    ("top centre", "upper middle"),
    ("top right", "upper right"),
    ("middle left", "centre left"),
    ("centre", "middle"),
    ("middle right", "centre right"),
    ("bottom left", "lower left"),
    ("bottom centre", "lower middle"),
    ("bottom right", "lower right"),
)


class Fact(NamedTuple):
    """One object of a scene, as indices into `COLOURS`, `DIGITS` and `CELLS`."""

    colour: int
    digit: int
    cell: int


@dataclass(frozen=True)
class Pattern:
    """One way to word a scene: a clause for each object and what stands before and between."""

    opening: str
    clause: str
    joint: str


PATTERNS: tuple[Pattern, ...] = (
    Pattern("", "a {colour} {digit} in the {cell}", " and "),
    Pattern("", "a {digit} in {colour} at the {cell}", " with "),
    Pattern("", "in the {cell} a {colour} {digit}", " , "),
    Pattern("there is ", "a {colour} {digit} at the {cell}", " and there is "),
    Pattern("", "{colour} {digit} {cell}", " , "),
)

_COLOUR_OF = {word: i for i, words in enumerate(COLOURS) for word in words}
_DIGIT_OF = {word: i for i, word in enumerate(DIGITS)}
_CELL_OF = {words: i for i, pair in enumerate(CELLS) for words in pair}
_FILLERS = frozenset(["there", "is", "and", "with", ","])


def _alternatives(words: dict[str, int]) -> str:
    # Longest first, so that "middle left" is not read as "middle".
    return "|".join(sorted(words, key=len, reverse=True))


def _clause_expression() -> re.Pattern[str]:
    slots = {
        "colour": f"(?P<colour#>{_alternatives(_COLOUR_OF)})",
        "digit": f"(?P<digit#>{_alternatives(_DIGIT_OF)})",
        "cell": f"(?P<cell#>{_alternatives(_CELL_OF)})",
    }
    clauses = sorted({p.clause for p in PATTERNS}, key=len, reverse=True)
    options = [
        re.sub(r"^a |(?<= )a ", "an? ", clause).format(**slots).replace("#", str(number))
        for number, clause in enumerate(clauses)
    ]
    return re.compile(r"\b(?:" + "|".join(options) + r")\b")


_CLAUSE = _clause_expression()


def write(facts: list[Fact], rng: np.random.Generator) -> str:
    """Word a scene: random pattern, random order of the objects, random synonyms.

    Args:
        facts: one or more objects.
        rng: source of every random choice.

    Raises:
        ValueError: if there is no object to name.
    """
    if not facts:
        raise ValueError("a caption needs at least one object")
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    clauses = []
    for i in rng.permutation(len(facts)):
        colour, digit, cell = facts[i]
        names = COLOURS[colour]
        clauses.append(
            pattern.clause.format(
                colour=names[rng.integers(len(names))],
                digit=DIGITS[digit],
                cell=CELLS[cell][rng.integers(2)],
            )
        )
    sentence = pattern.opening + pattern.joint.join(clauses)
    return re.sub(r"\ba eight\b", "an eight", sentence)


def parse(caption: str) -> frozenset[Fact] | None:
    """Facts that a caption states, or None if it is not a sentence of this language.

    Case and spaces around commas do not matter. Words that are neither part of a clause nor
    one of the connecting words make a caption unreadable, and so does naming a cell twice.
    """
    text = " ".join(caption.lower().replace(",", " , ").split())
    facts = []
    for match in _CLAUSE.finditer(text):
        values = {key[:-1]: word for key, word in match.groupdict().items() if word}
        facts.append(
            Fact(_COLOUR_OF[values["colour"]], _DIGIT_OF[values["digit"]], _CELL_OF[values["cell"]])
        )
    rest = _CLAUSE.sub(" ", text).split()
    cells = {fact.cell for fact in facts}
    if not facts or len(cells) < len(facts) or not _FILLERS.issuperset(rest):
        return None
    return frozenset(facts)


def is_fully_right(caption: str, truth: frozenset[Fact]) -> bool:
    """Whether a caption names exactly the objects of a scene: every colour, digit and position."""
    return parse(caption) == truth


def words() -> list[str]:
    """Every word that a caption can contain, sorted."""
    parts = [p.opening + p.clause.format(colour="", digit="", cell="") + p.joint for p in PATTERNS]
    parts += [word for names in COLOURS for word in names]
    parts += [*DIGITS, *(name for pair in CELLS for name in pair), "an"]
    return sorted({word for part in parts for word in part.split()})
