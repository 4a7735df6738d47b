"""One function over many tensors, several at a time, each on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_in_turn: ContextVar[bool] = ContextVar("in_turn", default=False)


@contextmanager
def in_turn(wanted: bool = True) -> Iterator[None]:
    """Makes `over_tensors` sequential inside the block, for functions that call collectives."""
    token = _in_turn.set(wanted or _in_turn.get())
    try:
        yield
    finally:
        _in_turn.reset(token)


def over_tensors(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> list[Result]:
    """`[function(item) for item in items]`.

    Counting, picking and packing run on one core however many torch has, so on a CPU whole tensors
    are divided over as many threads as torch uses, and torch uses one inside each. That also
    makes sums independent of the number of threads. On other devices items run in turn.

    Args:
        function: called from several threads; must not change what others read.
        items: what to call it with.
        device: where the tensors are.
    """
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))
    if device.type != "cpu" or threads < 2 or _in_turn.get():
        return [function(item) for item in items]
    before = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def as_caller(item: Item) -> Result:
        # A new thread is outside it, where tensors that were made inside cannot be written to.
        with torch.inference_mode(inference):
            return function(item)

    try:
        with ThreadPoolExecutor(threads, "vlp", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(as_caller, items))
    finally:
        torch.set_num_threads(before)  # what the next new thread inherits
