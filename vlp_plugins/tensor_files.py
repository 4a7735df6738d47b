"""Writes safetensors files tensor by tensor, and reads PyTorch's without running code in them.

`safetensors.torch.save_file` copies all tensors first: twice the memory for sums as large as the
model. The format is a length, a JSON header and the bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vlp_plugins.untrusted import check_read

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


def has_metadata(path: Path, key: str) -> bool:
    """True for a file of `write_tensors` whose first metadata has that key, even if it is cut."""
    begin = f'{{"__metadata__":{{{json.dumps(key)}:'.encode()
    with path.open("rb") as file:
        return file.read(8 + len(begin))[8:] == begin


def bytes_of_tensor(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor in row-major order; no copy if it lies on the CPU like that."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def load_pickled(path: Path, error: type[Exception], *, mmap: bool = False) -> Any:
    """What `torch.save` wrote, if it is plain data: on the CPU, and no larger than the file.

    Args:
        path: the file.
        error: raised if it describes more than it has; see `vlp_plugins.untrusted.read_limit`.
        mmap: leave the tensors in the file.

    Raises:
        Exception: what `torch.load` raises for damaged files and for objects that could run code.
    """
    check_unpacked(path, error)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # A tensor of stride 0, or a sparse one, has any number of elements in a few bytes.
    views: dict[object, int] = {}
    for tensor in _tensors(content, set()):
        strided = tensor.layout == torch.strided
        view = (tensor.data_ptr(), tensor.shape, tensor.stride()) if strided else id(tensor)
        views[view] = tensor.numel() * tensor.element_size()
    check_read(f"{path}: its tensors", sum(views.values()), error, stored=path.stat().st_size)
    return content


def check_unpacked(path: Path, error: type[Exception]) -> None:
    """Checks that a zip archive, which a PyTorch file is, does not unpack to more than it has.

    Raises:
        Exception: of type `error`, if it does.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile:  # whoever reads it says so
        return
    check_read(f"{path}, unpacked,", size, error, stored=path.stat().st_size)


def _tensors(content: object, met: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor in mappings and lists, which may hold one another."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple) and id(content) not in met:
        met.add(id(content))
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(part, met)
