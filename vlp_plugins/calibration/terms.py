"""The terms of a loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def total(terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the terms, scalars of any shape and dtype, in float32."""
    return torch.stack([term.float().reshape(()) for term in terms.values()]).sum()
