"""The file of a compact sparse checkpoint: one bit per element, and the non-zero elements.

A weight that is sparse enough to gain by it is two tensors: `NAME.bitmask`, uint8, one bit per
element in row-major order, the most significant bit first; and `NAME.values`, the elements whose
bit is set. Everything else, parameters and buffers, is there as it is, whatever is tied once.
NAME is the parameter's path in the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlp_plugins.masks.packed import count_ones, flaw, pack, packed_size, unpack
from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.errors import UnsupportedError, first_line
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.runtime.sharding import OnDemand
from vlp_plugins.runtime.typed import read_as

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kept_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a floating tensor that are stored, packed; a negative zero is one of them."""
    return pack(tensor.detach().cpu().view(_BITS[tensor.element_size()]) != 0)


def kept_values(tensor: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The elements at the set bits, `[kept]` on the CPU in row-major order, of the same dtype."""
    return tensor.detach().cpu()[unpack(bits, tensor.shape)]


def unpacked(bits: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of `kept_bits` and `kept_values`: of the values' dtype, zero where no bit is set."""
    dense = torch.zeros(tuple(shape), dtype=values.dtype, device=values.device)
    dense[unpack(bits, shape)] = values
    return dense


def packed_bytes(tensor: torch.Tensor, bits: torch.Tensor) -> int:
    """Bytes of bits and values: `(1 - s) + 1 / w` of the dense ones at sparsity s, w bits each."""
    return packed_size(tensor.numel()) + count_ones(bits) * tensor.element_size()


def mismatch(bits: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> str | None:
    """What keeps bits and values from being a tensor of that shape; None if they can be."""
    if found := flaw(bits, shape):
        return f"its bits: {found}"
    kept = count_ones(bits)
    if tuple(values.shape) != (kept,):
        return f"it has {list(values.shape)} values for {kept} of {math.prod(shape)} elements"
    return None


SPARSE_FILE = "vlp_sparse.safetensors"
FORMAT = Format(
    "sparse checkpoint",
    "vlp_sparse",
    1,
    UnsupportedError,
    "copy the whole folder again, or write it again with save_sparse",
)
_BITMASK, _VALUES = ".bitmask", ".values"


@dataclass(frozen=True, slots=True)
class SparseSize:
    """What a sparse checkpoint takes.

    Attributes:
        weights: number of weights that are stored as bits and values.
        stored: their bytes in the file.
        dense: their bytes in a dense checkpoint.
        file: bytes of the whole file.
    """

    weights: int
    stored: int
    dense: int
    file: int

    @property
    def ratio(self) -> float:
        """Stored bytes of the sparse weights over their dense bytes; 1 if there are none."""
        return self.stored / self.dense if self.dense else 1.0

    def __str__(self) -> str:
        return (
            f"{self.weights} weights take {text_of(self.stored)} instead of {text_of(self.dense)}, "
            f"the whole file {text_of(self.file)}"
        )


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file has, checked.

    Attributes:
        tensors: bits, values and dense tensors by their names in the file.
        shapes: of the sparse weights, by path.
        header: what else was written; see `save_sparse`.
    """

    tensors: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    header: Mapping[str, Any]

    def shapes_of_all(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters and buffers, by path."""
        packed = {f"{name}{end}" for name in self.shapes for end in (_BITMASK, _VALUES)}
        dense = {n: tuple(t.shape) for n, t in self.tensors.items() if n not in packed}
        return {**dense, **self.shapes}

    def dense(self, name: str) -> torch.Tensor:
        """The whole tensor of that path; a new one if it is sparse."""
        if name not in self.shapes:
            return self.tensors[name]
        bits, values = self.tensors[name + _BITMASK], self.tensors[name + _VALUES]
        return unpacked(bits, values, self.shapes[name])


def write_sparse(
    path: Path,
    state: Mapping[str, torch.Tensor],
    bits: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
) -> SparseSize:
    """Writes parameters and buffers by path; the elements of one weight at a time are copied.

    Args:
        path: a new file.
        state: parameters and buffers by path.
        bits: of `kept_bits`, for those that are stored sparse.
        header: written with the shapes of the sparse weights.
    """
    whole = {name: tensor for name, tensor in state.items() if name not in bits}
    whole |= {name + _BITMASK: packed for name, packed in bits.items()}
    values = {name + _VALUES: name for name in bits}

    def tensor(name: str) -> torch.Tensor:
        source = values.get(name)
        return whole[name] if source is None else kept_values(state[source], bits[source])

    shapes = {name: list(state[name].shape) for name in bits}
    write_artifact(path, FORMAT, OnDemand([*whole, *values], tensor), {"sparse": shapes, **header})
    return SparseSize(
        weights=len(bits),
        stored=sum(packed_bytes(state[name], packed) for name, packed in bits.items()),
        dense=sum(state[name].numel() * state[name].element_size() for name in bits),
        file=path.stat().st_size,
    )


def read_sparse(path: Path) -> Stored:
    """Reads what `write_sparse` wrote; nothing in the file is executed.

    Raises:
        UnsupportedError: if it is missing, damaged, foreign or of a newer version.
    """
    tensors, header = read_artifact(path, FORMAT)
    try:
        shapes = read_as(dict[str, tuple[int, ...]], header["sparse"], "sparse")
        for name, shape in shapes.items():
            if found := mismatch(tensors[name + _BITMASK], tensors[name + _VALUES], shape):
                raise ValueError(f"{name}: {found}")
        for key in ("model", "adapter"):
            read_as(str, header[key], key)
        read_as(dict[str, Any], header["settings"], "settings")
    except (KeyError, ValueError) as error:
        raise UnsupportedError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)}); {FORMAT.remedy}"
        ) from error
    return Stored(tensors, shapes, header)
