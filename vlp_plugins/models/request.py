"""What a user asks for: sparsity or budgets per modality, variant, owners of a tied weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from operator import index
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import (
    SparsityError,
    UnknownNameError,
    UnsupportedError,
    check_known,
    suggest,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

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
            f"{value!r} is not a sparsity; give a number such as 0.75, or a mapping such as "
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


def new_values_bytes(weights: Collection[Weight], targets: Iterable[Target]) -> int:
    """About what new values of weights take in all, float32, once each target is reached."""
    found = 0.0
    for target in targets:
        for weight in weights:
            share = target.get(weight.modality, 0) if isinstance(target, Mapping) else target
            found += 4 * weight.numel * (1 - share)
    return int(found)


def whole_number(name: str, value: Any) -> int:
    """The value as an `int`; 3.0 is 3.

    Raises:
        UnsupportedError: for 2.5, True, a text, ...
    """
    try:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if not _is_flag(value):
            return index(value)
    except TypeError:
        pass
    raise UnsupportedError(f"{name}={value!r} is not a whole number; give one such as 2")


def flag(name: str, value: Any) -> bool:
    """The value, if it is True or False: a text such as "no" would count as true.

    Raises:
        UnsupportedError: for anything else.
    """
    if not _is_flag(value):
        raise UnsupportedError(f"{name}={value!r} is neither True nor False; give one of them")
    return bool(value)


def _is_flag(value: Any) -> bool:
    """Whether that is a bool of Python, NumPy or torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def kinds_of(annotation: Any) -> set[str]:
    """The names of the types that an annotation allows, None left out: `int` of `int | None`."""
    if isinstance(annotation, str):
        kinds = {kind.strip() for kind in annotation.split("|")}
    else:
        union = get_origin(annotation) in (Union, UnionType)
        members = get_args(annotation) if union else (annotation,)
        kinds = {each.__name__ if isinstance(each, type) else str(each) for each in members}
    return kinds - {"None", "NoneType"}


def checked_arguments(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function whose whole numbers and flags are checked by their annotations.

    None is left alone: it is a default, or the function says what is wrong.
    """
    parameters = list(inspect.signature(function).parameters.values())
    kinds = {p.name: kinds_of(p.annotation) for p in parameters}

    def checked(name: str, value: Any) -> Any:
        if value is not None and kinds.get(name) == {"int"}:
            return whole_number(name, value)
        if value is not None and kinds.get(name) == {"bool"}:
            return flag(name, value)
        return value

    @wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        given: Callable[..., Result] = function
        known = [checked(name, value) for name, value in zip(kinds, args, strict=False)]
        rest = args[len(known) :]  # too many: the function says so
        try:
            return given(*known, *rest, **{k: checked(k, v) for k, v in options.items()})
        except (UnknownNameError, UnsupportedError) as error:
            for name in options:  # a misspelt argument was taken for a parameter of the method
                near = get_close_matches(name, kinds, n=1, cutoff=0.8)
                if name not in kinds and near and name in str(error):
                    hint = f" (did you mean {near[0]}= of {function.__name__}?)"
                    raise type(error)(f"{error}{hint}") from error
            raise

    return call


Variant = Literal["default", "published"]
Owners = Literal["all", "first"]


def is_published(variant: str) -> bool:
    """True for `published`, False for `default`; `UnsupportedError` for anything else."""
    check_known("variant", variant, get_args(Variant))
    return variant == "published"


def resolve_owners(owners: str | None, *, published: bool) -> Owners:
    """`all` or `first`; None: `all`, or `first` in the published variant.

    Raises:
        UnsupportedError: for anything else.
    """
    if owners is None:
        return "first" if published else "all"
    check_known("owners", owners, get_args(Owners))
    return "all" if owners == "all" else "first"
