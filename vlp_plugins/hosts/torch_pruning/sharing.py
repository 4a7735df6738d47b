"""Layers of one Parameter as one Module, which is the form of tie that Torch-Pruning knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def shared_modules(model: nn.Module) -> Iterator[None]:
    """Makes `nn.Linear` layers that share weight and bias one module inside the block.

    Torch-Pruning would cut two modules with one Parameter by themselves, and leave two Parameters.
    Of one module with two paths it makes one group. When the block ends every module is in its
    place again, with the Parameters, and their sizes, that are left.

    Networks that follow others (BLIP's momentum twins) hold Parameters of their own and are not
    touched: `prune_structured` cuts them alike, a loop of your own does not.
    """
    twins: list[tuple[nn.Module, str, nn.Linear, nn.Linear]] = []
    try:
        for parent, name, twin, first in list(_twins(model)):
            parent._modules[name] = first
            twins.append((parent, name, twin, first))
        yield
    finally:
        for parent, name, twin, first in twins:
            twin.weight = first.weight
            twin.bias = first.bias
            twin.in_features, twin.out_features = first.in_features, first.out_features
            parent._modules[name] = twin


def tied_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of layers that share Parameters and are two modules, each with the first one's path."""
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    return [(paths[id(first)], paths[id(twin)]) for _, _, twin, first in _twins(model)]


def _twins(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear, nn.Linear]]:
    """Parent and name of every layer whose Parameters an earlier one has, and both layers."""
    first: dict[tuple[int, int], nn.Linear] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if type(child) is not nn.Linear:
                continue
            known = first.setdefault((id(child.weight), id(child.bias)), child)
            if known is not child:
                yield parent, name, child, known
