"""What is lost by keeping rows in a smaller dtype."""

from __future__ import annotations

import torch

from vlp_plugins.rows.processes import add_up


class Rounding:
    """Adds up the squares of rows and of their errors, in float64."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Counts entries that will be kept as `dtype`.

        Args:
            values: float32 `[m]`.
            dtype: what they are rounded to.
        """
        if values.dtype == dtype:
            return
        error = values - values.to(dtype)
        norms = [torch.linalg.vector_norm(v, dtype=torch.float64) for v in (error, values)]
        squares = torch.stack(norms).square_()
        self._sums = squares if self._sums is None else self._sums + squares

    def relative(self, device: torch.device) -> float:
        """The norm of the errors over that of the rows, of all processes; 0 if nothing was rounded.

        Args:
            device: where the processes meet.
        """
        sums = torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums
        error, total = add_up(sums.to(device, copy=True)).tolist()
        return float((error / total) ** 0.5) if total else 0.0
