"""What a user asks for: a sparsity, or a budget per modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlp_plugins.errors import SparsityError, suggest

Target = float | Mapping[str, float]
"""Sparsity: the fraction removed in [0, 1), overall or by modality (`{"vision": 0.5, ...}`)."""


def target_of(value: Any) -> Target:
    """A number (Python's, NumPy's or a tensor's) or a mapping of numbers, checked.

    Raises:
        SparsityError: for anything else, an empty mapping, or outside [0, 1).
    """
    if isinstance(value, Mapping):
        if not value:
            raise SparsityError(
                'the mapping of sparsities is empty; give for instance {"vision": 0.5, "text": 0.8}'
            )
        return {str(name): check_sparsity(inner) for name, inner in value.items()}
    return check_sparsity(value)


def check_sparsity(value: Any) -> float:
    """The value as a float in [0, 1), else a `SparsityError`."""
    try:
        number = None if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise SparsityError(
            f"{value!r} is no sparsity; give a number such as 0.75, or a mapping such as "
            '{"vision": 0.5, "text": 0.8}'
        )
    if not 0 <= number < 1:
        hint = f"; did you mean {number / 100:g}?" if 1 < number < 100 else ""
        raise SparsityError(
            f"sparsity is the fraction removed and lies in [0, 1), not {number:g}{hint}"
        )
    return number


def budget_of(target: Target, modalities: Sequence[str]) -> dict[str, float]:
    """The sparsity of every modality.

    Raises:
        SparsityError: if a budget names a modality that the model lacks, or leaves one out.
    """
    if not isinstance(target, Mapping):
        return dict.fromkeys(modalities, check_sparsity(target))
    for name in target:
        if name not in modalities:
            raise SparsityError(
                f"budget for modality {name!r}, which this model has not"
                f"{suggest(name, list(modalities))}"
            )
    for modality in modalities:
        if modality not in target:
            raise SparsityError(
                f"no budget for modality {modality!r}; give each of "
                f"{', '.join(modalities)} one ({modality}=0 keeps all of it)"
            )
    return {modality: check_sparsity(target[modality]) for modality in modalities}
