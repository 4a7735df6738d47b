"""Losses and gradients that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlp_plugins.runtime.errors import NonFiniteError
from vlp_plugins.runtime.sharding import here, in_any_process, is_sharded


def check_loss(terms: Mapping[str, torch.Tensor], index: int, *, together: bool = False) -> None:
    """Raises `NonFiniteError` with the name of the first term that is NaN or infinite.

    Args:
        terms: of the loss, scalars.
        index: of the batch.
        together: all processes run this batch, and all raise if one must.
    """
    values = torch.stack([term.detach().float().reshape(()) for term in terms.values()])
    bad = ~torch.isfinite(values)
    if together:
        bad = in_any_process(bad)
    for name, value, is_bad in zip(terms, values.tolist(), bad.tolist(), strict=True):
        if is_bad:
            raise NonFiniteError(
                f"the loss {name!r} of batch {index} is {value}; look at that batch and at the "
                "checkpoint (weights after a diverged training), or leave such batches out with "
                "skip_nonfinite"
            )


def first_nonfinite(gradients: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first gradient with NaN or infinity; of sharded ones the same everywhere."""
    if not gradients:
        return None
    if is_sharded(gradients.values()):
        finite = [torch.isfinite(here(gradient)).all() for gradient in gradients.values()]
        bad = in_any_process(~torch.stack(finite)).tolist()
        return next((name for name, is_bad in zip(gradients, bad, strict=True) if is_bad), None)
    # NaN or infinity always shows in the sum, at a fraction of the cost of a look at every
    # element, and one transfer shows all sums. An overflow shows too, hence the second look.
    sums = torch.stack([gradient.sum() for gradient in gradients.values()])
    suspects = (~torch.isfinite(sums)).tolist()
    for (name, gradient), suspect in zip(gradients.items(), suspects, strict=True):
        if suspect and not bool(torch.isfinite(gradient).all()):
            return name
    return None
