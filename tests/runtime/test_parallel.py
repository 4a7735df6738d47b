"""One function over many tensors, in threads; data made ahead of their use."""

import threading
import time
from itertools import count, islice

import pytest
import torch

from vlp_plugins.runtime.parallel import ahead, over_tensors, prefetched


def test_threads_may_write_to_what_their_caller_made_in_inference_mode(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.inference_mode():
        rows = torch.zeros(4, 3)
        over_tensors(lambda index: rows[index].fill_(index), range(4), rows.device)
    assert rows[:, 0].tolist() == [0, 1, 2, 3]


def test_threads_are_outside_inference_mode_where_their_caller_is(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    made = over_tensors(lambda index: torch.ones(index), range(1, 4), torch.device("cpu"))
    assert not any(tensor.is_inference() for tensor in made)


def slow_first(number):
    time.sleep(0.05 if number == 0 else 0)
    if number == 5:
        raise ValueError("five")
    return number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_and_errors_come_in_order_whichever_is_made_first(workers):
    found = []
    with pytest.raises(ValueError, match="five"):
        iter_into(found, ahead(slow_first, range(9), workers))
    assert found == [0, 1, 2, 3, 4]


def iter_into(found, items):
    for item in items:
        found.append(item)


def test_a_few_items_are_taken_ahead_and_no_more():
    taken = []
    numbers = ahead(lambda number: number, (taken.append(n) or n for n in count()), 2)
    assert list(islice(numbers, 3)) == [0, 1, 2]
    assert len(taken) <= 2 * 2 + 3


def test_items_are_made_before_they_are_asked_for_and_not_after_the_last_one():
    made = []
    others = set(threading.enumerate())

    def numbers():
        for number in count():
            made.append(number)
            yield number

    items = prefetched(numbers(), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:  # one taken, two waiting, one in hand
        time.sleep(0.01)
    assert made == [0, 1, 2, 3]

    items.close()
    assert set(threading.enumerate()) <= others
    assert made == [0, 1, 2, 3]


def test_what_the_maker_raises_comes_after_its_items():
    def two():
        yield 1
        yield 2
        raise SystemExit("leaving")

    found = []
    with pytest.raises(SystemExit, match="leaving"):
        iter_into(found, prefetched(two()))
    assert found == [1, 2]
