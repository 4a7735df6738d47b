"""Captions of the scenes: varied wording out, checked truth in.

A caption names colour, digit and position of every object of a scene; see `Language`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.demo.language import Fact, Language, Pattern

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
CELLS: tuple[tuple[str, ...], ...] = (
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
PATTERNS: tuple[Pattern, ...] = (
    Pattern("", "a {colour} {digit} in the {cell}", " and "),
    Pattern("", "a {digit} in {colour} at the {cell}", " with "),
    Pattern("", "in the {cell} a {colour} {digit}", " , "),
    Pattern("there is ", "a {colour} {digit} at the {cell}", " and there is "),
    Pattern("", "{colour} {digit} {cell}", " , "),
)
LANGUAGE = Language(
    COLOURS, DIGITS, CELLS, PATTERNS, frozenset(["there", "is", "and", "with", ","])
)


def write(facts: Sequence[Fact], rng: np.random.Generator) -> str:
    """Word a scene; see `Language.write`."""
    return LANGUAGE.write(facts, rng)


def parse(caption: str) -> frozenset[Fact] | None:
    """Facts that a caption states, or None if it is none; see `Language.parse`."""
    return LANGUAGE.parse(caption)


def is_fully_right(caption: str, truth: frozenset[Fact]) -> bool:
    """Whether a caption names exactly the objects of a scene: every colour, digit and position."""
    return parse(caption) == truth


def words() -> list[str]:
    """Every word that a caption can contain, sorted."""
    return LANGUAGE.words()
