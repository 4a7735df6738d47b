"""What is said about a scene: questions with checkable answers, and conversations made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from benchmarks.demo import captions
from benchmarks.demo.captions import CELLS, COLOURS, DIGITS
from benchmarks.demo.language import Fact

T = TypeVar("T")
Kind = Literal["colour", "digit", "position", "count"]
KINDS: tuple[Kind, ...] = ("colour", "digit", "position", "count")
CAPTION_PROMPTS = (
    "Describe the image.",
    "Describe this image.",
    "What is in the image?",
    "Write a caption for the image.",
)
# What `vlp` and lmms-eval say after a question. In training it stands after the first question
# of most conversations, so that a question alone is answered as well.
BRIEFLY = "\nAnswer the question using a single word or phrase."
BRIEFLY_SHARE = 0.7
TURNS = 3
MATCHING_SHARE = 0.4  # of the questions of a training conversation: see `count_matching`
PRESENT_SHARE = 0.7  # of the questions "how many are red?" that ask for a colour that is there


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: what is asked for.
        text: the question.
        answers: every wording of the right answer.
        fact: the object asked about; None if the question is about all of them.
    """

    kind: Kind
    text: str
    answers: tuple[str, ...]
    fact: Fact | None

    def is_right(self, answer: str) -> bool:
        """Whether an answer is a right one; case and spaces do not matter."""
        return " ".join(answer.lower().split()) in self.answers


class Turn(NamedTuple):
    """What the user asks and what the assistant answers."""

    question: str
    answer: str


Conversation = Sequence[Turn]
"""About one image, which is shown before the first question."""


def ask(kind: Kind, facts: Sequence[Fact], rng: np.random.Generator) -> Question:
    """Ask about a random object of a scene, in one of several ways.

    An object is described by its cell, or by its colour or digit where no other object has it.

    Args:
        kind: what to ask for.
        facts: the objects of the scene.
        rng: source of every random choice.

    Raises:
        ValueError: if there is no object to ask about.
    """
    if not facts:
        raise ValueError("a question needs at least one object")
    if kind == "count":
        return _ask_count(facts, rng)
    fact = _pick(facts, rng)
    colour, cell = _pick(COLOURS[fact.colour], rng), _pick(CELLS[fact.cell], rng)
    digit = DIGITS[fact.digit]
    one_colour = sum(other.colour == fact.colour for other in facts) == 1
    one_digit = sum(other.digit == fact.digit for other in facts) == 1
    if kind == "colour":
        texts = [f"What colour is the digit in the {cell}?"] * 2
        texts += [f"What colour is the {digit}?"] * one_digit
        answers = COLOURS[fact.colour]
    elif kind == "digit":
        texts = [f"Which digit is in the {cell}?"] * 2
        texts += [f"Which digit is {colour}?"] * one_colour
        answers = (digit,)
    else:
        texts = [f"Where is the {colour} digit?"] * one_colour
        texts += [f"Where is the {digit}?"] * one_digit
        texts += [f"Where is the {colour} {digit}?"]
        same = [other.cell for other in facts if other[:2] == fact[:2]]
        answers = tuple(name for place in same for name in CELLS[place])
    return Question(kind, _pick(texts, rng), answers, fact)


def _ask_count(facts: Sequence[Fact], rng: np.random.Generator) -> Question:
    if rng.random() < 0.5:
        return Question("count", "How many digits are there?", (DIGITS[len(facts)],), None)
    if rng.random() < PRESENT_SHARE:
        colour = _pick(facts, rng).colour
    else:
        colour = int(rng.integers(len(COLOURS)))
    number = sum(fact.colour == colour for fact in facts)
    text = f"How many digits are {_pick(COLOURS[colour], rng)}?"
    return Question("count", text, (DIGITS[number],), None)


def count_matching(facts: Sequence[Fact], rng: np.random.Generator) -> Question:
    """Ask how many objects show one digit, or are in one cell.

    Without such questions the chat model does not learn to find an object by digit or cell: here
    a half-found match already makes an answer more likely. It found colours by their counts.

    Args:
        facts: the objects of the scene.
        rng: source of every random choice.
    """
    fact = _pick(facts, rng)
    shown = rng.random() < 0.5
    if rng.random() < 0.5:
        digit = fact.digit if shown else int(rng.integers(len(DIGITS)))
        number = sum(other.digit == digit for other in facts)
        text = f"How many {DIGITS[digit]}{'es' if DIGITS[digit] == 'six' else 's'} are there?"
    else:
        cell = fact.cell if shown else int(rng.integers(len(CELLS)))
        number = sum(other.cell == cell for other in facts)
        text = f"How many digits are in the {_pick(CELLS[cell], rng)}?"
    return Question("count", text, (DIGITS[number],), None)


def describe(facts: Sequence[Fact], rng: np.random.Generator) -> Conversation:
    """A caption, asked for in one of several ways."""
    return [Turn(_pick(CAPTION_PROMPTS, rng), captions.write(facts, rng))]


def converse(facts: Sequence[Fact], rng: np.random.Generator) -> Conversation:
    """A few questions of random kinds."""
    ending = BRIEFLY if rng.random() < BRIEFLY_SHARE else ""
    turns = []
    for _ in range(TURNS):
        matching = rng.random() < MATCHING_SHARE
        question = count_matching(facts, rng) if matching else ask(_pick(KINDS, rng), facts, rng)
        turns.append(Turn(question.text + ending, _pick(question.answers, rng)))
        ending = ""
    return turns


def _pick(names: Sequence[T], rng: np.random.Generator) -> T:
    return names[int(rng.integers(len(names)))]
