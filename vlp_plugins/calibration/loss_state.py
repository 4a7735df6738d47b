"""The state that losses change (BLIP's queues and momentum copies): taken, put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.sharding import is_sharded


@contextmanager
def loss_state_again(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Puts the state back as it was, whatever happens inside."""
    before = copy_of_state(model, adapter)
    try:
        yield
    finally:
        write_state(model, adapter, before)


def copy_of_state(model: nn.Module, adapter: Adapter) -> list[torch.Tensor]:
    """The state as it is, in the adapter's order."""
    return [tensor.detach().clone() for tensor in adapter.loss_state(model)]


def bytes_of_state(model: nn.Module, adapter: Adapter) -> int:
    """Bytes that the state takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.loss_state(model))


def check_whole(state: Sequence[torch.Tensor]) -> None:
    """Raises `UnsupportedError` if losses change something that is sharded.

    They would change what `fully_shard` gathers for a forward pass, which is thrown away.
    """
    if is_sharded(state):
        raise UnsupportedError(
            "the losses of this model change parameters in place (momentum copies?) that "
            "fully_shard has shared out among processes; leave these parameters whole: "
            "fully_shard(model, ignored_params=set(adapter.loss_state(model)))"
        )


@torch.no_grad()
def write_state(model: nn.Module, adapter: Adapter, state: Sequence[torch.Tensor]) -> None:
    """Inverse of `copy_of_state`; tensors may come from another device."""
    for tensor, value in zip(adapter.loss_state(model), state, strict=True):
        tensor.copy_(value)
