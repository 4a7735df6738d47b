"""The self-check of structured pruning: what a model gives out, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.runtime.model_state import callers_defaults, flags_kept, takes_model


@torch.no_grad()
@takes_model
def outputs(model: nn.Module, adapter: Adapter, batch: Batch) -> dict[str, Tensor]:
    """What each stream of a model gives out, in evaluation mode.

    Args:
        model: any that the adapter claims; its modules' training flags are as before afterwards.
        adapter: of the model.
        batch: as the adapter reads it; the model gets a copy on its device.

    Returns:
        By name of the stream its tensor; of several tensors by `stream.name`.

    Raises:
        BatchError: if the batch lacks an input.
        StructureError: if no stream returns a tensor.
    """
    batch = to_device(batch, next(model.parameters()).device)
    with flags_kept(model), callers_defaults(model):
        model.eval()
        found = {
            name: tensor
            for stream in adapter.streams(model, batch)
            for name, tensor in _tensors(stream.name, stream.run())
        }
    if not found:
        raise StructureError(
            f"no stream of adapter {adapter.name!r} returns a tensor, so models cannot be "
            "compared; let Stream.run return what that part of the model gives out"
        )
    return found


def check_equal(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Checks that two models give out the same.

    Args:
        expected: of `outputs`.
        found: of `outputs`, for the same batch.
        tolerance: largest difference, in units of the largest absolute value of the expected.

    Raises:
        StructureError: naming the first stream that differs, and by how much.
    """
    if expected.keys() != found.keys():
        raise StructureError(f"streams {sorted(expected)} were expected, found {sorted(found)}")
    for name, wanted in expected.items():
        if wanted.shape != found[name].shape:
            raise StructureError(
                f"stream {name!r} is {list(found[name].shape)}, not {list(wanted.shape)}"
            )
        error = relative_error(wanted, found[name])
        if not error <= tolerance:  # NaN is not either
            raise StructureError(
                f"the cut model computes something else: stream {name!r} differs from that of the "
                f"uncut model with the same rows and columns at zero by {error:.1e} of its largest "
                f"value (allowed: {tolerance:.0e}); attributes such as the size of heads may not "
                "fit its layers, call patch(model, adapter)"
            )


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected; NaN if there is one."""
    if not expected.numel():
        return 0.0
    wanted = expected.double()
    error = (found.to(wanted) - wanted).abs().amax()
    largest = wanted.abs().amax()
    return float(error / largest if largest else error)


def _tensors(name: str, returned: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(returned, Tensor):
        yield name, returned
        return
    items: Iterable[tuple[object, object]] = ()
    if isinstance(returned, Mapping):
        items = returned.items()
    elif isinstance(returned, list | tuple):
        items = enumerate(returned)
    for key, value in items:
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
