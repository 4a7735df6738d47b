"""safetensors files written tensor by tensor are those that safetensors reads."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vlp_plugins.runtime.artifacts import write_tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def some_tensors() -> dict[str, torch.Tensor]:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 50
    tensors = {f"t{i}": values.to(dtype) for i, dtype in enumerate(DTYPES)}
    return tensors | {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.5)}


def test_what_is_read_back_is_what_was_written(tmp_path):
    tensors = some_tensors()
    write_tensors(tmp_path / "a.safetensors", tensors, {"key": 'text "quoted" - ü'})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"key": 'text "quoted" - ü'}


def test_views_and_tensors_of_two_names_are_written_as_they_look(tmp_path):
    matrix = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "a", {"t": matrix.T, "again": matrix, "same": matrix[:, 1]}, {})
    found = load_file(tmp_path / "a")
    assert torch.equal(found["t"], matrix.T)
    assert torch.equal(found["again"], matrix)
    assert torch.equal(found["same"], matrix[:, 1])


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(KeyError):
        write_tensors(tmp_path / "a", {"t": torch.zeros(2, dtype=torch.complex64)}, {})
