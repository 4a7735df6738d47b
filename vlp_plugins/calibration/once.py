"""Measures a tensor that enters several layers once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from vlp_plugins.calibration.tokens import TokenReader
from vlp_plugins.statistics.base import ActivationStatistic


@dataclass(frozen=True, slots=True)
class _Known:
    inputs: weakref.ref[torch.Tensor]
    version: int
    real: torch.Tensor | None
    value: torch.Tensor


class MeasuredOnce:
    """The values that were measured in one batch.

    Query, key and value read one tensor, all cross-attention layers read the same image
    embeddings. A tensor is recognised by its identity, its version counter and the identity of its
    token mask, never by its values. It is known by a weak reference only: no activation lives
    longer than it would without the measurement. A tensor made in inference mode (a view of a
    parameter that was) has no version counter and is measured every time.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _Known] = {}

    def value(
        self,
        statistic: ActivationStatistic,
        inputs: torch.Tensor,
        real: torch.Tensor | None,
        reader: TokenReader,
    ) -> torch.Tensor:
        """The statistic of the real tokens of an input; the same object for the same input."""
        if inputs.is_inference():
            return _measure(statistic, inputs, real, reader)
        key = (id(inputs), statistic.name, reader.key)
        known = self._known.get(key)
        if (
            known is not None
            and known.inputs() is inputs  # an id is used again after its tensor has gone
            and known.version == inputs._version
            and known.real is real
        ):
            return known.value
        value = _measure(statistic, inputs, real, reader)
        self._known[key] = _Known(weakref.ref(inputs), inputs._version, real, value)
        return value

    def clear(self) -> None:
        """Forgets everything; to be called at the end of a batch."""
        self._known.clear()


def _measure(
    statistic: ActivationStatistic,
    inputs: torch.Tensor,
    real: torch.Tensor | None,
    reader: TokenReader,
) -> torch.Tensor:
    parts = [statistic.measure(tokens) for tokens in reader.read(inputs, real)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
