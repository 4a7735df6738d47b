"""What a method says about a run: its parameters, what it chose, and what it changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.memory import text_of


def parameter_rows(masks: Mapping[str, Masks]) -> list[tuple[str, list[str]]]:
    """The parameters that the manifests record, one text per mask set; last, new weights.

    Args:
        masks: by title; methods may record other things at other sparsities.
    """
    recorded = [each.manifest.parameters for each in masks.values()]
    names = dict.fromkeys(name for parameters in recorded for name in parameters)
    rows = [
        (name, [value_text(each[name]) if name in each else "" for each in recorded])
        for name in names
    ]
    if any(each.new_values is not None for each in masks.values()):
        rows.append(("new weights", [_new_weights(each) for each in masks.values()]))
    return rows


def _new_weights(masks: Masks) -> str:
    if masks.new_values is None:
        return "none"
    return f"of the {masks.kept:,} kept elements, {text_of(masks.values_bytes)}"


def value_text(value: Any) -> str:
    """A value as a person writes it; lists of pairs, such as curves, as `a: b`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {value_text(inner)}" for name, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        pairs = value and all(_is_pair(each) for each in value)
        inner = (
            (f"{value_text(a)}: {value_text(b)}" for a, b in value)
            if pairs
            else map(value_text, value)
        )
        return ("; " if pairs else ", ").join(inner)
    return str(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2
