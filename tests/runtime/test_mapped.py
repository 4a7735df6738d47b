"""Views of mapped files: what is given back, what is brought back, and what is left alone."""

import ctypes
import errno
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlp_plugins.runtime.mapped import discard, places, release, untouched
from vlp_plugins.runtime.memory import resident_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
SIZE = 4_000_000


@pytest.fixture
def mapped(tmp_path):
    """Two tensors of a file, neighbours in it, and its path."""
    drawn = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "a file of weights.safetensors"
    save_file({"first": drawn, "second": drawn[:1001] + 1}, path)
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("first"), file.get_tensor("second"), path


def test_pages_that_were_read_are_given_back_and_read_again(mapped):
    first, second, _ = mapped
    before = first.sum(), second.sum()
    held = resident_bytes()
    release([first, second])
    assert held - resident_bytes() > 0.9 * first.nbytes
    assert (first.sum(), second.sum()) == before


def test_a_place_is_that_in_the_file(mapped):
    first, second, path = mapped
    other = torch.ones(1000)
    found = places([first, second, other, torch.empty(0), torch.empty(3, device="meta")])
    assert found[2:] == [None, None, None]
    for tensor, place in zip((first, second), found, strict=False):
        assert place.file == str(path)
        content = path.read_bytes()[place.begin : place.begin + tensor.nbytes]
        assert content == tensor.numpy().tobytes()


def test_what_was_written_stays_until_it_is_discarded(mapped):
    first, second, path = mapped
    dense, neighbour = first.clone(), second.clone()
    assert untouched([first, second]) == [True, True]
    first[SIZE // 2 :] = 7
    assert untouched([first])[0] is False
    release([first])
    assert bool((first[SIZE // 2 :] == 7).all())
    assert torch.equal(first[: SIZE // 2], dense[: SIZE // 2])
    discard([first])
    assert torch.equal(first, dense)
    assert torch.equal(second, neighbour)
    assert untouched([first, second]) == [True, True]
    with safe_open(path, framework="pt") as file:  # the file never changed
        assert torch.equal(file.get_tensor("first"), dense)


def test_what_the_system_refuses_is_told_where_values_depend_on_it(mapped, monkeypatch):
    class Refusing:
        def madvise(self, *_):
            ctypes.set_errno(errno.EINVAL)
            return -1

    first, _, _ = mapped
    first[:] = 7
    monkeypatch.setattr("vlp_plugins.runtime.mapped.ctypes.CDLL", lambda *_, **__: Refusing())
    release([first])
    with pytest.raises(OSError, match="Invalid argument: the values of a file cannot be brought"):
        discard([first])


def test_memory_that_is_of_no_file_is_left_alone():
    values = torch.randn(SIZE)
    expected = values.clone()
    assert untouched([values, values[5:9]]) == [False, False]
    release([values, values.view(2000, 2000).T, values[::3]])
    assert torch.equal(values, expected)
