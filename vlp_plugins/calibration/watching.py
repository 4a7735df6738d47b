"""The modules that use the weights, watched while an adapter's streams run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlp_plugins.models.adapter import Adapter, Owner, Stream
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import StatisticsError, UnsupportedError
from vlp_plugins.runtime.model_state import (
    callers_defaults,
    fast_path_off,
    flags_kept,
    random_state_kept,
)
from vlp_plugins.runtime.sharding import as_forward, at_rest


@dataclass(frozen=True, slots=True)
class Use:
    """One module as the user of one weight.

    Attributes:
        weight: canonical name.
        index: of the module among the weight's owners.
        owner: the module.
    """

    weight: str
    index: int
    owner: Owner


def uses_of(model: nn.Module, weights: WeightMap) -> Iterator[tuple[str, nn.Module, list[Use]]]:
    """Every module that uses weights, once: its path, itself, and what it uses.

    A module that is reached by two paths cannot tell which path a call meant: it counts as
    the first of its owners, or each call would count twice.
    """
    found: dict[nn.Module, tuple[str, dict[str, Use]]] = {}
    for name, weight in weights.items():
        for index, owner in enumerate(weight.owners):
            module = model.get_submodule(owner.module)
            _, uses = found.setdefault(module, (owner.module, {}))
            uses.setdefault(f"{name}.{owner.parameter}", Use(name, index, owner))
    for module, (path, uses) in found.items():
        yield path, module, list(uses.values())


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Any]]:
    """The model in evaluation mode.

    Yields:
        A list for the handles of hooks. On leaving they are removed, and training flags (of every
        single module) are as they were.
    """
    hooks: list[Any] = []
    with flags_kept(model), fast_path_off():
        try:
            model.eval()
            yield hooks
        finally:
            for handle in hooks:
                handle.remove()


def run_quietly(model: nn.Module, run: Callable[[], None]) -> None:
    """Runs parts of a model without gradients, as if by its forward.

    A stream that draws random numbers does not disturb those of the caller. Inference mode is left
    if the caller is in it: its tensors have no version counter, so nobody could tell whether one
    was changed.
    """
    device = next(model.parameters()).device
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        random_state_kept(device),
        callers_defaults(model),
    ):
        as_forward(model, run)
        at_rest(model)


def check_reached(adapter: Adapter, weights: WeightMap, reached: Collection[str]) -> None:
    """Makes sure that the streams ran every weight.

    Args:
        adapter: whose streams they were.
        weights: of the model.
        reached: canonical names.

    Raises:
        StatisticsError: naming the first that was not reached.
    """
    if missed := [name for name in weights if name not in reached]:
        raise StatisticsError(
            f"no stream of adapter {adapter.name!r} ran {named(weights, missed)}; the "
            "adapter must run it or exclude it (with ModuleAdapter: exclude=..., or batches "
            "that use the whole model)"
        )


def named(weights: WeightMap, missed: Sequence[str]) -> str:
    """The first of some weights, with its modules, and how many there are."""
    owners = ", ".join(owner.module for owner in weights[missed[0]].owners)
    return f"weight {missed[0]!r} at {owners} ({len(missed)} weights in all)"


def real_of(adapter: Adapter, stream: Stream, owner: Owner) -> torch.Tensor | None:
    """Which tokens of a module's input are real in a stream; None: all.

    Raises:
        UnsupportedError: if the stream does not say.
    """
    try:
        return stream.real[owner.tokens]
    except KeyError:
        raise UnsupportedError(
            f"adapter {adapter.name!r}: stream {stream.name!r} does not say which "
            f"tokens of {owner.tokens!r} are real, which {owner.module} reads (it says: "
            f"{', '.join(stream.real) or 'nothing'}); add {owner.tokens!r} to "
            "Stream.real, with None if all are"
        ) from None
