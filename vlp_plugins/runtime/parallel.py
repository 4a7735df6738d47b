"""One function over many tensors, data made ahead of their use, one wait for many numbers."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread
from typing import Any, TypeVar

import torch

from vlp_plugins.runtime.memory import local_processes

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


def on_host(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Small tensors of one dtype joined on the CPU, 1-D, after one wait for their devices."""
    device = next((v.device for v in values if v.device.type != "cpu"), torch.device("cpu"))
    return torch.cat([value.detach().flatten().to(device) for value in values]).cpu()


_MOST_WORKERS = 8
_PATIENCE = 0.1  # seconds


def default_workers() -> int:
    """Threads that prepare data next to the model: this process' share of the cores but one.

    At most 8.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_WORKERS, ((cores or 1) - 1) // local_processes())


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """`map(function, items)` in the same order, by threads that work `workers` items ahead.

    For functions that spend their time outside of Python, as decoding an image does. What one
    raises is raised in its turn.

    Args:
        function: called from several threads; must not draw from the global random state then.
        items: iterated over by the caller's thread.
        workers: number of threads; 0 for none, which is `map`.
    """
    if workers < 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, "vlp-data")
    try:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def prefetched(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The items, made by another thread, `depth` of them (at least 1) before they are asked for.

    What the iterable raises is raised where its item would be. If the caller stops, so does it.
    """
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = Event()

    def put(is_item: bool, value: Any) -> bool:
        while not stopped.is_set():
            try:
                made.put((is_item, value), timeout=_PATIENCE)
            except queue.Full:
                continue
            return True
        return False

    def run() -> None:
        try:
            if all(put(True, item) for item in items):
                put(False, None)
        except BaseException as error:  # everything is the caller's, SystemExit too
            put(False, error)

    thread = Thread(target=run, name="vlp-data", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = made.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join(timeout=1.0)  # no longer: it may wait for a network
