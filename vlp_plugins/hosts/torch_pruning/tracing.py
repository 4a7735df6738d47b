"""What Torch-Pruning runs to see how layers depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch_pruning.utils.utils import flatten_as_list

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.runtime.model_state import callers_defaults


def forward_of(adapter: Adapter) -> Callable[[nn.Module, Batch], list[Tensor]]:
    """A `forward_fn`: runs the streams of an adapter and returns all that they give out.

    Parameters that want no gradient (a frozen tower) want one meanwhile, or nothing of them could
    be traced.
    """

    def forward(model: nn.Module, batch: Batch) -> list[Tensor]:
        batch = to_device(batch, next(model.parameters()).device)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad(), callers_defaults(model):
                returned = [stream.run() for stream in adapter.streams(model, batch)]
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        found = [tensor for each in returned for tensor in _tensors(each)]
        if not found:
            raise StructureError(
                f"no stream of adapter {adapter.name!r} returns a tensor, so Torch-Pruning cannot "
                "trace the model; let Stream.run return what that part of the model gives out"
            )
        return found

    return forward


def _tensors(returned: object) -> Iterator[Tensor]:
    for value in flatten_as_list(returned) or ():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            yield value
