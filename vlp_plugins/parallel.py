"""One function over many tensors, several at a time, each on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_tensors(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> list[Result]:
    """`[function(item) for item in items]`.

    Counting, picking and packing run on one core however many torch has, so on a CPU whole tensors
    are shared out among as many threads as torch uses, and torch uses one inside each. That also
    makes sums independent of the number of threads. On other devices items run in turn.

    Args:
        function: called from several threads; must not change what others read.
        items: what to call it with.
        device: where the tensors are.
    """
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))
    if device.type != "cpu" or threads < 2:
        return [function(item) for item in items]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "vlp", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(before)  # what the next new thread inherits
