"""Batches of a data pass: checked, counted, hashed, moved to a device, read again.

Batches are mappings of tensors, or what else a loader makes: tuples, lists, bare tensors.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.runtime.errors import BatchError, DataError

logger = logging.getLogger("vlp_plugins.calibration")

DIGEST_BYTES = 32


def interleave(*loaders: Iterable[Batch]) -> Iterator[Batch]:
    """One batch of each loader in turn, until all are exhausted.

    Example:
        photos, drawings = vlp.batches("photos", model), vlp.batches("drawings", model)
        statistics = vlp.gather(model, vlp.interleave(photos, drawings))

    Raises:
        DataError: if a loader is a single batch.
    """
    for loader in loaders:
        check_batches(loader)
    running = [iter(loader) for loader in loaders]
    while running:
        for loader in list(running):
            try:
                yield next(loader)
            except StopIteration:
                running.remove(loader)


def named_batches(batches: Iterable[Any], adapter: Adapter) -> Iterable[Batch]:
    """The batches as `named` makes them, unless the adapter takes any, as `ModuleAdapter` does."""
    if adapter.takes_sequences or isinstance(batches, Mapping | str | bytes | _Named):
        return batches
    if type(batches) in (list, tuple):
        found = [named(batch) for batch in batches]
        same = all(new is batch for new, batch in zip(found, batches, strict=True))
        return batches if same else found
    if isinstance(batches, Iterator):
        return map(named, batches)
    if not hasattr(type(batches), "__iter__"):  # a tensor, or nothing to iterate over
        return batches
    return _Sized(batches) if hasattr(type(batches), "__len__") else _Named(batches)


class _Named:
    """`named` of every batch, as often as it is iterated over."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches: Any = batches

    def __iter__(self) -> Iterator[Batch]:
        return map(named, self._batches)


class _Sized(_Named):
    def __len__(self) -> int:
        return len(self._batches)


def named(batch: Any) -> Any:
    """A batch as a mapping of tensors by the names that models have for them.

    Tensors without a name are known by their shapes: images `[B, 3, H, W]` of floating dtype,
    integers `[B, L]` that are tokens or, if all are 0 or 1, their mask, integers `[B]` for labels.
    A mapping may be followed by labels; a list of mappings has one for each row. Lists of numbers
    and arrays become tensors. A batch with anything else in it stays as it is.

    Raises:
        BatchError: if rows have different lengths.
    """
    if isinstance(batch, Mapping):
        lists = {k: v for k, v in batch.items() if isinstance(v, list | tuple | np.ndarray)}
        return {**batch, **{k: _tensor(k, v) for k, v in lists.items()}} if lists else batch
    if isinstance(batch, torch.Tensor):
        batch = (batch,)
    if not isinstance(batch, tuple | list) or not batch:
        return batch
    if all(isinstance(row, Mapping) and row.keys() == batch[0].keys() for row in batch):
        return {key: _tensor(key, [row[key] for row in batch]) for key in batch[0]}
    found: dict[str, Any] = {}
    rest = list(batch)
    if isinstance(rest[0], Mapping):
        found = dict(named(rest.pop(0)))
        if len(rest) == 1 and "labels" not in found:
            labels = _tensor("labels", rest[0])
            return found | {"labels": labels} if isinstance(labels, torch.Tensor) else found
    for item in rest:
        tensor = _tensor("labels", item) if isinstance(item, list) else item
        name = _name_of(tensor) if isinstance(tensor, torch.Tensor) else None
        if name is None or name in found:
            return batch
        found[name] = tensor
    return found


def _name_of(tensor: torch.Tensor) -> str | None:
    if tensor.is_floating_point():
        return "pixel_values" if tensor.ndim == 4 else None
    if tensor.ndim == 2:
        return "attention_mask" if bool(((tensor == 0) | (tensor == 1)).all()) else "input_ids"
    return "labels" if tensor.ndim == 1 else None


_PADDED = ("input_ids", "attention_mask", "labels")


def _tensor(name: str, value: Any) -> Any:
    """A tensor of a list of numbers, arrays or tensors of one shape; anything else stays as it is.

    Raises:
        BatchError: if rows of words have different lengths.
    """
    try:
        if isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor) for v in value):
            return torch.stack([torch.as_tensor(row) for row in value])
        array = np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:  # images of several sizes may be a list
        if name not in _PADDED:
            return value
        raise BatchError(
            f"{name} holds rows of different lengths; pad them: the model's processor does it with "
            "padding=True, return_tensors='pt'"
        ) from error
    if array.dtype.kind not in "biuf":
        return value
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.float() if array.dtype == np.float64 else tensor


def check_batches(batches: Iterable[object], limit: int | None = None) -> None:
    """Raises `DataError` if that is a single batch, or no batches, or if `limit` leaves none."""
    kind = type(batches)
    if isinstance(batches, Mapping) or hasattr(batches, "ndim"):  # a tensor or an array
        rows = ""
        if hasattr(batches, "ndim"):
            shape = list(getattr(batches, "shape", ()))
            rows = f" of shape {shape}, whose rows would be taken for batches"
        raise DataError(
            f"that is a single batch; give a list of batches, or a loader, not a {kind.__name__}"
            f"{rows}: put it in a list, [batch]"
        )
    iterable = hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")
    if isinstance(batches, str | bytes) or not iterable:
        made = f": vlp_plugins.batches({batches!r}, model) makes them" if kind is str else ""
        raise DataError(
            f"{batches!r} is a {kind.__name__}, not batches; give a list of batches, or a loader"
            + made
        )
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no batch; use 1 or more, or None for all")


def warn_if_fewer(read: int, limit: int | None) -> None:
    """Warns if the data ended before the limit that was asked for."""
    if limit is not None and read < limit:
        logger.warning("the data gave %d batches, fewer than limit=%d; used them all", read, limit)


def number_of_batches(batches: Iterable[Batch], limit: int | None) -> int | None:
    """How many batches a pass reads at most; None if that is unknown."""
    try:
        length = len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader over an iterable data set
        return limit
    return length if limit is None else min(length, limit)


def batches_again(
    batches: Iterable[Batch], limit: int | None = None
) -> Callable[[], Iterator[Batch]]:
    """A function whose every call starts a pass over the same batches in the same order.

    Later passes are compared with the first by hash, except those over a list or a tuple.

    Args:
        batches: any iterable; an iterator, which can be read once, allows a single pass.
        limit: number of batches of every pass; None for all.

    Raises:
        DataError: at once for a single batch or a limit below 1; during a pass if there are no
            batches, if they are not those of the first pass, or if they cannot be read again.
    """
    check_batches(batches, limit)
    once = isinstance(batches, Iterator)
    hashes: list[bytes] | None = None if isinstance(batches, list | tuple) else []
    passes = 0

    def again() -> Iterator[Batch]:
        nonlocal passes
        passes += 1
        if once and passes > 1:
            raise DataError(
                "the batches are an iterator (a generator?), which can be read once, but the "
                "method goes over them several times; give a list of batches, or a loader"
            )
        return _compared(islice(batches, limit), hashes)

    return again


def _compared(batches: Iterator[Batch], hashes: list[bytes] | None) -> Iterator[Batch]:
    """The batches, which must be those of an earlier pass; a first pass adds its hashes."""
    seen = len(hashes or ())
    digest = b""
    index = -1
    for index, batch in enumerate(batches):
        if hashes is not None:
            digest = chain_hash(digest, batch)
            if index == len(hashes):
                hashes.append(digest)
            elif digest != hashes[index]:
                raise DataError(
                    f"batch {index} is not the one of the first pass over the data; the method "
                    "needs the same batches in every pass: turn shuffling and augmentation off, "
                    "or give a list of batches"
                )
        yield batch
    if index < 0:
        raise DataError("the calibration data is empty: no batch was read; check its path")
    if index + 1 < seen:
        raise DataError(
            f"the data gave {index + 1} batches, but {seen} in an earlier pass; the method needs "
            "the same batches in every pass: give a list of batches, or a loader without shuffling"
        )


def chain_hash(previous: bytes, batch: Any) -> bytes:
    """SHA-256 of the hash of the batches before, and the keys, dtypes, shapes and bytes of this.

    Of values that are neither tensors nor plain Python values only the type counts.
    """
    digest = hashlib.sha256(previous)
    for piece in _pieces(batch):
        digest.update(piece)
    return digest.digest()


def batch_size(batch: Any) -> int:
    """Length of the first dimension of `input_ids`, or else of the first tensor.

    A batch may have more images than texts, or fewer.

    Raises:
        BatchError: if there is no tensor.
    """
    if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), torch.Tensor):
        return len(ids)
    size = next((len(t) for t in _tensors(batch) if t.ndim), None)
    if size is None:
        raise BatchError(
            f"batch (a {type(batch).__name__}) holds no tensor with a batch dimension; make "
            "batches with the model's processor and return_tensors='pt'"
        )
    return size


def to_device(batch: Any, device: torch.device) -> Any:
    """A copy of the batch with every tensor on `device`.

    Forwards that normalise their input in place change the copy, not the caller's batch, which
    later passes read again. Tensors made in inference mode become ordinary ones. To a CUDA device
    they go through pinned memory, and nothing waits for them.
    """
    if isinstance(batch, torch.Tensor):
        with torch.inference_mode(False):
            if device.type == "cuda" and batch.device.type == "cpu":
                return batch.pin_memory().to(device, non_blocking=True)
            return batch.to(device, copy=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)


def _pieces(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, torch.Tensor):
        yield f"tensor {value.dtype} {list(value.shape)}:".encode()
        data = value.detach().cpu().contiguous().reshape(-1)
        yield memoryview(data.view(torch.uint8).numpy())  # type: ignore[arg-type]
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}:".encode()
        for key in sorted(value, key=str):
            yield f"key {key!r}:".encode()
            yield from _pieces(value[key])
    elif isinstance(value, tuple | list):
        yield f"sequence {len(value)}:".encode()
        for item in value:
            yield from _pieces(item)
    elif value is None or isinstance(value, str | bytes | int | float):
        yield f"{value!r}:".encode()
    else:
        yield f"{type(value).__qualname__}:".encode()
