"""A small language about scenes: sentences out, facts in.

A sentence names colour, digit and position of objects, in one of several patterns and with
synonyms. `Language.parse` is the inverse of `Language.write`: it recovers the facts from any
wording that can be written, and says None when a sentence does not state facts, so that "is this
generated caption right?" has an exact answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

Names = tuple[tuple[str, ...], ...]
"""The synonyms of every colour or cell."""


class Fact(NamedTuple):
    """One object of a scene, as numbers of a colour, a digit and a cell."""

    colour: int
    digit: int
    cell: int


@dataclass(frozen=True)
class Pattern:
    """One way to word a scene: a clause for each object and what stands before and between."""

    opening: str
    clause: str
    joint: str


@dataclass(frozen=True)
class Language:
    """Names and patterns.

    Attributes:
        colours: synonyms of every colour.
        digits: the name of every digit.
        cells: synonyms of every cell.
        patterns: ways to word a scene.
        fillers: words that may stand between clauses.
    """

    colours: Names
    digits: tuple[str, ...]
    cells: Names
    patterns: tuple[Pattern, ...]
    fillers: frozenset[str]

    def write(self, facts: Sequence[Fact], rng: np.random.Generator) -> str:
        """Word a scene: random pattern, random order of the objects, random synonyms.

        Args:
            facts: one or more objects.
            rng: source of every random choice.

        Raises:
            ValueError: if there is no object to name.
        """
        if not facts:
            raise ValueError("a caption needs at least one object")
        pattern = self.patterns[rng.integers(len(self.patterns))]
        clauses = []
        for i in rng.permutation(len(facts)):
            colour, digit, cell = facts[i]
            names = self.colours[colour]
            places = self.cells[cell]
            clauses.append(
                pattern.clause.format(
                    colour=names[rng.integers(len(names))],
                    digit=self.digits[digit],
                    cell=places[rng.integers(len(places))],
                )
            )
        sentence = pattern.opening + pattern.joint.join(clauses)
        return re.sub(r"\ba eight\b", "an eight", sentence)

    def parse(self, caption: str) -> frozenset[Fact] | None:
        """Facts that a caption states, or None if it is not a sentence of this language.

        Case and spaces around commas do not matter. Words that are neither part of a clause nor
        one of the connecting words make a caption unreadable, and so does naming a cell twice.
        """
        text = " ".join(caption.lower().replace(",", " , ").split())
        facts = []
        for match in self._clause.finditer(text):
            values = {key[:-1]: word for key, word in match.groupdict().items() if word}
            facts.append(
                Fact(
                    self._colour_of[values["colour"]],
                    self._digit_of[values["digit"]],
                    self._cell_of[values["cell"]],
                )
            )
        rest = self._clause.sub(" ", text).split()
        cells = {fact.cell for fact in facts}
        if not facts or len(cells) < len(facts) or not self.fillers.issuperset(rest):
            return None
        return frozenset(facts)

    def words(self) -> list[str]:
        """Every word that a sentence can contain, sorted."""
        parts = [
            p.opening + p.clause.format(colour="", digit="", cell="") + p.joint
            for p in self.patterns
        ]
        parts += [word for names in self.colours for word in names]
        parts += [*self.digits, *(name for names in self.cells for name in names), "an"]
        return sorted({word for part in parts for word in part.split()})

    @cached_property
    def _colour_of(self) -> dict[str, int]:
        return _numbers(self.colours)

    @cached_property
    def _digit_of(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.digits)}

    @cached_property
    def _cell_of(self) -> dict[str, int]:
        return _numbers(self.cells)

    @cached_property
    def _clause(self) -> re.Pattern[str]:
        slots = {
            "colour": f"(?P<colour#>{_alternatives(self._colour_of)})",
            "digit": f"(?P<digit#>{_alternatives(self._digit_of)})",
            "cell": f"(?P<cell#>{_alternatives(self._cell_of)})",
        }
        clauses = sorted({p.clause for p in self.patterns}, key=len, reverse=True)
        options = [
            re.sub(r"^a |(?<= )a ", "an? ", clause).format(**slots).replace("#", str(number))
            for number, clause in enumerate(clauses)
        ]
        return re.compile(r"\b(?:" + "|".join(options) + r")\b")


def _numbers(names: Names) -> dict[str, int]:
    return {word: i for i, words in enumerate(names) for word in words}


def _alternatives(words: Iterable[str]) -> str:
    # Longest first, so that "middle left" is not read as "middle".
    return "|".join(sorted(words, key=len, reverse=True))
