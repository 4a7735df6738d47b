"""Makes batches while the steps before them are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(
    items: Iterable[Item], make: Callable[[Item], Made], workers: int
) -> Iterator[tuple[Item, Made]]:
    """Yields every item with what is made of it, in their order.

    Args:
        items: are taken `workers` ahead.
        make: is called in other threads (decoding of images lets them run beside each other), and
            must not draw from the global random state then.
        workers: number of threads; 0 makes everything here, when it is needed.

    Raises:
        Exception: whatever `make` raises, when the item's turn has come.
    """
    if not workers:
        for item in items:
            yield item, make(item)
        return
    waiting: deque[tuple[Item, Future[Made]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vlp-batches")
    try:
        for item in items:
            waiting.append((item, pool.submit(make, item)))
            if len(waiting) > workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
