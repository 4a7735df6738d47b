"""Writes safetensors files tensor by tensor.

`safetensors.torch.save_file` copies all tensors first: twice the memory for sums as large as the
model. The format is a length, a JSON header and the bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

_ALIGNMENT = 8
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a file that `safetensors` reads; two names may hold one tensor, which it refuses.

    Args:
        path: the file, which is replaced.
        tensors: on any device, by name; at most one at a time is copied.
        metadata: kept in the header.

    Raises:
        OSError: if it cannot be written.
        KeyError: for a dtype that the format lacks.
    """
    # The widest first, as safetensors does: so every tensor starts at a multiple of its element.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(bytes_of_tensor(tensors[name]))


def bytes_of_tensor(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor in row-major order; no copy if it lies on the CPU like that."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
