"""Several passes over the calibration data see the same batches, or say why not."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toy import toy_batches

from vlp_plugins.calibration.batches import batches_again
from vlp_plugins.runtime.errors import DataError


def test_a_list_or_a_loader_serves_any_number_of_passes():
    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=2)
    for batches in (toy_batches(5), loader):
        again = batches_again(batches, 3)
        for _ in range(3):
            assert len(list(again())) == 3


def test_a_generator_serves_one_pass():
    again = batches_again(iter(toy_batches(2)))
    assert len(list(again())) == 2
    with pytest.raises(DataError, match="can be read once.*give a list"):
        again()


def test_other_batches_in_a_later_pass_are_found():
    loader = DataLoader(TensorDataset(torch.arange(64.0)), batch_size=4, shuffle=True)
    again = batches_again(loader)
    list(again())
    with pytest.raises(DataError, match=r"batch 0 is not the one of the first pass.*shuffling"):
        list(again())


def test_fewer_batches_in_a_later_pass_are_found():
    class Shrinking:
        left = 4

        def __iter__(self):
            self.left -= 1
            return iter(toy_batches(self.left))

    again = batches_again(Shrinking())
    list(again())
    with pytest.raises(DataError, match="gave 2 batches, but 3 in an earlier pass"):
        list(again())


def test_a_first_pass_may_stop_early():
    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=2)
    again = batches_again(loader)
    next(again())
    assert len(list(again())) == 5


def test_nothing_to_read_is_an_error():
    with pytest.raises(DataError, match="empty"):
        list(batches_again([])())
    with pytest.raises(DataError, match="limit=0 leaves no batch"):
        batches_again(toy_batches(2), 0)
    with pytest.raises(DataError, match="a single batch"):
        batches_again(toy_batches(1)[0])
