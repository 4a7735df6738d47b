"""One function over many tensors, in threads."""

import torch

from vlp_plugins.runtime.parallel import over_tensors


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
