"""What is said about images: captions, questions, and conversations as data sets have them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COLUMNS = ("conversations", "conversation", "messages")
"""Names of columns that hold whole conversations."""

CHOICES = "choices"
"""Name of the column of what a question lets choose among."""

_PLACEHOLDER = re.compile(r"<(image|video)>\s*")
_ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is said about images.

    Attributes:
        messages: `role` (`system`, `user`, `assistant`) and `content`, a list of
            `{"type": "image"}` and `{"type": "text", "text": ...}`. The last is of the assistant
            where an answer is known, else of the user.
    """

    messages: tuple[Mapping[str, Any], ...]

    @property
    def images(self) -> int:
        """How many images it is about."""
        parts = (part for message in self.messages for part in message["content"])
        return sum(part["type"] == "image" for part in parts)

    @property
    def answered(self) -> bool:
        """Whether the assistant has the last word."""
        return bool(self.messages[-1]["role"] == "assistant")

    @classmethod
    def about(cls, text: str, answer: str | None = None, *, images: int = 1) -> Conversation:
        """The user shows images and says a text; the assistant answers it, if that is given."""
        shown: list[Mapping[str, Any]] = [{"type": "image"}] * images
        messages = [_message("user", [*shown, {"type": "text", "text": text}])]
        if answer is not None:
            messages.append(_message("assistant", [{"type": "text", "text": answer}]))
        return cls(tuple(messages))

    @classmethod
    def read(cls, turns: object, *, images: int) -> Conversation:
        """Reads turns as data sets have them, up to the last answer.

        Args:
            turns: list of `{"from": "human" or "gpt", "value": ...}` or `{"role": ..., "content":
                ...}`. `<image>` in a text stands for an image, and so does a part of a content with
                the type `image` or `image_url`. Without any, the first user shows all images.
            images: how many images come with it.

        Raises:
            ValueError: if it is something else, nothing is answered, or images do not match.
        """
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise ValueError("its conversation is not a list of messages")
        messages = [_read_message(turn) for turn in turns]
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise ValueError("its conversation has no answer of the assistant")
        found = cls(tuple(messages))
        if not found.images and images:
            first = next((i for i, each in enumerate(messages) if each["role"] == "user"), None)
            if first is None:
                raise ValueError("its conversation has no message of a user")
            shown: list[Mapping[str, Any]] = [{"type": "image"}] * images
            messages[first] = _message("user", [*shown, *messages[first]["content"]])
            found = cls(tuple(messages))
        if found.images != images:
            raise ValueError(f"its conversation is about {found.images} images, and has {images}")
        return found


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about an image, which the processor puts into its words.

    Attributes:
        question: as the data has it.
        answer: None if the model is to answer.
        choices: that the answer is one of; empty for an open question.
        answers: of all people that were asked, where the data has them.
    """

    question: str
    answer: str | None = None
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = field(default=(), compare=False, repr=False)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"\W*([A-Za-z])(?:[.,:)]|\s*$)")  # not the article of "a boat"


def choices_in(value: object) -> tuple[str, ...]:
    """The choices that a data set lists; none if it is no list."""
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()


def chosen(said: str, choices: Sequence[str]) -> str:
    """The choice that is meant by its text, its letter or its number from 0; else what was said."""
    if said in choices or not choices:
        return said
    letter = _LETTER.match(said)
    number = LETTERS.find(letter[1].upper()) if letter else -1
    if said.strip().isdecimal():
        number = int(said)
    return choices[number] if 0 <= number < len(choices) else said


def _message(role: str, content: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return {"role": role, "content": list(content)}


def _read_message(turn: object) -> Mapping[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a message of its conversation is a {type(turn).__name__}, not an object")
    said = str(turn.get("role", turn.get("from", ""))).lower()
    if said not in _ROLES:
        raise ValueError(
            f"a message of its conversation is of {said!r}, none of {', '.join(_ROLES)}"
        )
    content = turn.get("content", turn.get("value"))
    parts: list[Mapping[str, Any]] = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        parts += _read_part(part)
    return _message(_ROLES[said], parts)


def _read_part(part: object) -> list[Mapping[str, Any]]:
    """A text cut at its placeholders, or a part of a content as it is."""
    if isinstance(part, Mapping):
        kind = str(part.get("type", "text"))
        if kind in ("image", "image_url"):
            return [{"type": "image"}]
        if kind != "text":
            raise ValueError(f"its conversation has a part of type {kind!r}; {_KINDS}")
        part = part.get("text")
    if not isinstance(part, str):
        raise ValueError(f"a message of its conversation is {part!r}, not text")
    if "<video>" in part:
        raise ValueError(f"its conversation is about a video; {_KINDS}")
    parts: list[Mapping[str, Any]] = []
    last = 0
    for found in _PLACEHOLDER.finditer(part):
        parts += [{"type": "text", "text": part[last : found.start()]}, {"type": "image"}]
        last = found.end()
    parts.append({"type": "text", "text": part[last:]})
    return [each for each in parts if each["type"] == "image" or each["text"]]


_KINDS = "texts and images are read, videos and sounds are not: give frames as images"
