"""What every registered method, allocation and token selection is, for someone who chooses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Method
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.registry import (
    METHOD_KINDS,
    Kind,
    Offer,
    Registry,
    parameters_of,
    public_name,
)

_PAPER = re.compile(r" ?\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


@dataclass(frozen=True)
class MethodParameter:
    """One setting of a method.

    Attributes:
        name: as users write it.
        default: what is taken otherwise; None where there is none, too.
        required: whether there is no default.
        help: what it is, of a docstring; empty if none says it.
    """

    name: str
    default: Any
    required: bool
    help: str


@dataclass(frozen=True)
class PartDescription:
    """An allocation or a token selection, as `vlp methods` shows it.

    Attributes:
        name: what users call it.
        distribution: who brings it.
        summary: the first line of its docstring.
        paper: where it was published; empty if the docstring does not say.
    """

    name: str
    distribution: str
    summary: str
    paper: str


@dataclass(frozen=True)
class MethodDescription(PartDescription):
    """A method as `vlp methods` shows it.

    The texts are those of the docstring of what is registered: its first line, in parentheses the
    paper with its year; then paragraphs. What it needs, `Method` declares.

    Attributes:
        details: paragraphs.
        parameters: its settings.
        method: made with its defaults; None if it cannot be.
    """

    details: tuple[str, ...]
    parameters: tuple[MethodParameter, ...]
    method: Method | None

    @property
    def needs(self) -> tuple[str, ...]:
        """Of `data`, `gradients` and `training`, what it needs; no method needs labels."""
        method = self.method
        if method is None:
            return ()
        found = {
            "data": method.reads_data,
            "gradients": method.takes_gradients,
            "training": method.trains,
        }
        return tuple(name for name, needed in found.items() if needed)


def describe_methods(registry: Registry) -> list[MethodDescription]:
    """Every method, those of scores and solvers among them, by name."""
    return [describe_method(registry, name) for name in registry.method_names()]


def describe_method(registry: Registry, name: str) -> MethodDescription:
    """One method.

    Raises:
        UnknownNameError: if there is no such method.
    """
    offer = registry.find(name, *METHOD_KINDS)
    try:
        method = make_method(registry, name)
    except Exception:  # a plug-in whose factory wants a parameter, or is broken: the others show
        method = None
    text = _own_docstring(offer)
    summary, paper, details = _described(text)
    helps = {**_helps(method), **docstring_entries(text)}
    return MethodDescription(
        name,
        offer.distribution,
        summary,
        paper,
        tuple(details),
        tuple(
            MethodParameter(
                public_name(each.name),
                None if each.default is each.empty else each.default,
                each.default is each.empty,
                helps.get(each.name, ""),
            )
            for each in parameters_of(offer.factory).values()
            if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        ),
        method,
    )


def describe_parts(registry: Registry, kind: Kind) -> list[PartDescription]:
    """Everything of one kind that is registered, by name."""
    offers = {name: registry.find(name, kind) for name in registry.names(kind)}
    return [
        PartDescription(name, offer.distribution, *_described(_own_docstring(offer))[:2])
        for name, offer in offers.items()
    ]


def _own_docstring(offer: Offer) -> str:
    """Not `inspect.getdoc`: what a base class says is not what this one does."""
    own = offer.factory.__doc__
    return inspect.cleandoc(own) if isinstance(own, str) else ""


def _described(text: str) -> tuple[str, str, list[str]]:
    """The first line of a docstring without its paper, the paper, and the paragraphs."""
    described = _SECTION.split(text)[0].strip()
    summary, *details = (" ".join(part.split()) for part in described.split("\n\n"))
    paper = _PAPER.search(summary)
    return _PAPER.sub("", summary).removesuffix("."), paper[1] if paper else "", details


def _helps(method: Method | None) -> Mapping[str, str]:
    """What the classes of a method and of its score say about their attributes."""
    parts = [getattr(method, "score", None), method]
    if isinstance(method, Composition):
        parts = [method.score]
    classes = (type(part) for part in parts if part is not None)
    return {
        k: v for each in classes for k, v in docstring_entries(inspect.getdoc(each) or "").items()
    }


def docstring_entries(text: str) -> dict[str, str]:
    """What a docstring in Google style says about parameters or attributes, by name."""
    _, *sections = _SECTION.split(text)
    found = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title in ("Args", "Attributes"):
            for name, words in _ENTRY.findall(body):
                found[name] = " ".join(words.split())
    return found
