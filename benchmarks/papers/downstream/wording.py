"""Captions of the downstream scenes: sentences that pre-training never read, of words it knows.

A caption names two of a scene's objects. The demo's tokenizer has 37 words, so the wording differs
by patterns and by how places are called, not by vocabulary.
"""

from __future__ import annotations

import numpy as np

from benchmarks.demo.captions import COLOURS, DIGITS
from benchmarks.demo.language import Fact, Language, Pattern

NAMED = 2  # objects that a caption names

# Row by row from the top left.
CELLS: tuple[tuple[str, ...], ...] = (
    ("top left", "upper left"),
    ("top middle", "upper centre"),
    ("top right", "upper right"),
    ("left middle", "left centre"),
    ("centre", "middle"),
    ("right middle", "right centre"),
    ("bottom left", "lower left"),
    ("bottom middle", "lower centre"),
    ("bottom right", "lower right"),
)
PATTERNS: tuple[Pattern, ...] = (
    Pattern("", "the {colour} {digit} is at the {cell}", " and "),
    Pattern("", "the {digit} in the {cell} is {colour}", " , "),
    Pattern("", "at the {cell} is a {digit} in {colour}", " and "),
    Pattern("", "in {colour} there is a {digit} at the {cell}", " and "),
    Pattern("with ", "a {colour} {digit} , {cell}", " and "),
    Pattern("", "{cell} , {digit} in {colour}", " , "),
)
LANGUAGE = Language(COLOURS, DIGITS, CELLS, PATTERNS, frozenset(["with", "and", ","]))


def caption(facts: frozenset[Fact], rng: np.random.Generator) -> str:
    """A sentence about two objects of a scene.

    Raises:
        ValueError: if the scene has fewer.
    """
    objects = sorted(facts)
    if len(objects) < NAMED:
        raise ValueError(f"a caption names {NAMED} objects; the scene has {len(objects)}")
    chosen = rng.permutation(len(objects))[:NAMED]
    return LANGUAGE.write([objects[i] for i in chosen], rng)


def is_true(said: str, truth: frozenset[Fact]) -> bool:
    """Whether a caption names two objects and both are in the scene as it says."""
    stated = LANGUAGE.parse(said)
    return stated is not None and len(stated) == NAMED and stated <= truth
