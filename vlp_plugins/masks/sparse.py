"""Compact sparse checkpoints: a folder whose weights are plain dense ones again after loading.

A weight that is sparse enough to gain by it is two tensors of the file: `NAME.bitmask`, uint8, one
bit per element in row-major order, the most significant bit first; and `NAME.values`, the elements
whose bit is set. Everything else, parameters and buffers, is there as it is, tied tensors once.
NAME is the parameter's path in the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.masks.apply import check_applied
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import count_ones, flaw, pack, packed_size, unpack
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.architecture import fill, unfilled_model
from vlp_plugins.models.discovery import recall_adapter, registry
from vlp_plugins.models.places import Places, filled_state
from vlp_plugins.models.saving import check_not_rebuilt, copy_companions, write_configuration
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.errors import UnsupportedError, first_line
from vlp_plugins.runtime.files import atomic_folder, check_new_folder
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.runtime.model_state import bare, neutral_state
from vlp_plugins.runtime.offload import check_resident
from vlp_plugins.runtime.sharding import OnDemand, is_sharded
from vlp_plugins.runtime.untrusted import read_as

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
    """Bytes of a checkpoint: of its sparse weights, of the same stored dense, and of the file."""

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

    Those in `bits` (see `kept_bits`) are stored sparse; the header gets their shapes as well.
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


def save_sparse(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    masks: Masks | None = None,
    adapter: Adapter | None = None,
    source: str | None = None,
    overwrite: bool = False,
) -> SparseSize:
    """Writes a pruned model in little space: bits and values of what is sparse, the rest as it is.

    Every bit of every parameter and buffer comes back from `load_sparse`. A weight that would not
    gain is stored dense. The folder has the model's configuration, but no file by a name that
    transformers reads: only `load_sparse` and `load_model` can load it.

    Args:
        model: any; without a configuration of transformers it can only be loaded into a model.
        folder: a new one.
        masks: of the model, for the file to say where they come from.
        adapter: of the model; None takes that of the masks, or asks all.
        source: where the model came from; its tokenizer and processor files are copied.
        overwrite: replace a folder that this function wrote; no other is ever replaced.

    Returns:
        What it takes.

    Raises:
        MaskError: if something that the masks remove is not zero.
        UnsupportedError: if the model is sharded, on the meta device, quantised, or has heads or
            units cut out.
        UnclaimedModelError: without an adapter, if none claims the model.
        OutputError: if the folder exists or cannot be written.
    """
    model, target = bare(model), Path(os.path.realpath(folder))
    check_new_folder(target, mark=SPARSE_FILE, overwrite=overwrite)
    state = state_of(model)
    _check_plain(model)
    adapter = adapter or _adapter_for(model, masks)
    if masks is not None:
        check_applied(masks, model, adapter, "apply them first: masks.apply(model)")
    header = {
        "model": type(model).__name__,
        "adapter": adapter.name,
        "settings": adapter.settings(),
        "masks": None if masks is None else asdict(masks.manifest),
    }
    bits = _worth_packing(model, adapter, state)
    with atomic_folder(target, mark=SPARSE_FILE, overwrite=overwrite) as temporary:
        if hasattr(getattr(model, "config", None), "save_pretrained"):
            write_configuration(model, temporary, dtype=getattr(model, "dtype", None))
        size = write_sparse(temporary / SPARSE_FILE, state, bits, header)
        copy_companions(source, temporary)
    return size


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the model would save, detached, each tensor once under its first name."""
    saved = filled_state(model)
    named = [*Places(model).distinct(), *model.named_buffers()]
    return {
        name: (saved[name] if tensor.is_meta else tensor).detach()
        for name, tensor in named
        if name in saved
    }


def check_whole(model: nn.Module, remedy: str) -> None:
    """Checks that this process has the values of every tensor of a model.

    Raises:
        UnsupportedError: naming the first that it lacks, and the remedy.
    """
    for name, tensor in state_of(model).items():
        if tensor.is_meta or is_sharded((tensor,)):
            what = "on the meta device" if tensor.is_meta else "sharded over processes"
            raise UnsupportedError(f"{name} is {what}; {remedy}")


def _check_plain(model: nn.Module) -> None:
    check_not_rebuilt(model)
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(
            f"{type(model).__name__} is quantised, which sparse checkpoints do not know; save it "
            "before it is quantised"
        )
    check_whole(
        model,
        "save a whole model: load its values first, or gather them into one process by "
        "torch.distributed.checkpoint.state_dict",
    )


def _adapter_for(model: nn.Module, masks: Masks | None) -> Adapter:
    if masks is None:
        return registry().adapter_for(model)
    return recall_adapter(model, masks.manifest.adapter, masks.manifest.adapter_settings)


def _worth_packing(
    model: nn.Module, adapter: Adapter, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The bits of the prunable weights that take less in this way, by path."""
    found = {}
    for weight in WeightMap.of(model, adapter).values():
        for path in weight.aliases:
            # Another name of a parameter is there under its first, another part of it is done.
            if path not in state or path in found:
                continue
            stored = state[path]
            bits = kept_bits(stored)
            if packed_bytes(stored, bits) < stored.numel() * stored.element_size():
                found[path] = bits
    return found


def is_sparse(folder: str | os.PathLike[str]) -> bool:
    """True for a folder that `save_sparse` wrote."""
    return (Path(folder) / SPARSE_FILE).is_file()


@neutral_state()
def load_sparse(
    folder: str | os.PathLike[str], *, into: nn.Module | None = None
) -> tuple[nn.Module, Adapter]:
    """Loads what `save_sparse` wrote.

    Args:
        folder: with the file and, without `into`, the configuration.
        into: a model of that structure to write the values into, in its dtype and on its device;
            it keeps its ties. None makes a new model, on the CPU, in the dtypes of the file and
            in evaluation mode.

    Returns:
        The model, whose weights are plain dense ones, and the adapter it was saved with.

    Raises:
        UnsupportedError: if the file is missing, damaged, foreign or of a newer version, or of
            another model, which is unchanged then; or if the configuration does not make the model.
        UnclaimedModelError: if no installed adapter claims the model.
    """
    folder = Path(folder)
    stored = read_sparse(folder / SPARSE_FILE)
    if into is None:
        model = _rebuilt(folder, stored)
    else:
        model = bare(into)
        check_resident(model, "loading into it")
        check_whole(model, "load into it before it is sharded, and after `to_empty`")
        _check_fits(model, stored, folder)
    adapter = recall_adapter(model, stored.header["adapter"], stored.header["settings"])
    if into is None:
        return model.eval(), adapter
    with torch.no_grad():
        for name, tensor in state_of(model).items():
            tensor.copy_(stored.dense(name))
    return into, adapter


def sparse_model(folder: str | os.PathLike[str]) -> nn.Module:
    """`load_sparse` for a caller who chooses the adapter."""
    return _rebuilt(Path(folder), read_sparse(Path(folder) / SPARSE_FILE)).eval()


def _rebuilt(folder: Path, stored: Stored) -> nn.Module:
    """The model that the configuration describes, with the values of the file."""
    if not (folder / "config.json").is_file():
        raise UnsupportedError(
            f"{folder} has no config.json to make a {stored.header['model']} of; make the model "
            "yourself and give it: load_sparse(folder, into=model)"
        )
    known = registry()
    model = unfilled_model(str(folder), map(known.adapter, known.adapter_names()))
    _check_fits(model, stored, folder)
    fill(model, ((name, stored.dense(name)) for name in stored.shapes_of_all()))
    return model


def _check_fits(model: nn.Module, stored: Stored, folder: Path) -> None:
    """Raises `UnsupportedError` unless the model has exactly the tensors of the file."""
    wanted = {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}
    found = stored.shapes_of_all()
    kind = type(model).__name__
    other = f"it is of another model than this {kind}, or its ties are others"
    lacking, surplus = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    for verb, names in (("lacks", lacking), ("has, which the model lacks,", surplus)):
        if names:
            raise UnsupportedError(
                f"{folder / SPARSE_FILE} {verb} {len(names)} tensors, first {min(names)} "
                f"({stored.header['model']}); {other}"
            )
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            raise UnsupportedError(
                f"{folder / SPARSE_FILE}: {name} is {list(found[name])}, but {list(shape)} in the "
                f"{kind}; {other}"
            )
