"""Losses of a fine-tuning, one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp_plugins.runtime.errors import NonFiniteError
from vlp_plugins.runtime.files import append_text, check_own, write_text

FILE = "losses.jsonl"
_BEGIN = '{"step": '


class LossLog:
    """Means of the terms of the loss over a few steps.

    A line has `step` (done so far), `epoch`, `learning_rate`, `loss`, the terms under `losses`, and
    `gradient_norm` if gradients are clipped.

    Attributes:
        lines: all of them, those of an interrupted run included.
    """

    def __init__(self, folder: Path | None) -> None:
        """Names the place.

        Args:
            folder: of the file; None keeps the lines in memory.
        """
        self.lines: list[dict[str, Any]] = []
        self._path = None if folder is None else folder / FILE
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def begin(self, step: int) -> None:
        """Keeps what an earlier run has written of the first steps, and drops the rest.

        Raises:
            OutputError: if the file is a link or was not written by a run.
        """
        if self._path is None:
            return
        check_own(self._path, _is_ours)
        if not self._path.exists():
            return
        if not step:
            self._path.unlink()
            return
        text = self._path.read_text(encoding="utf-8")
        self.lines = [line for line in _whole(text) if line["step"] <= step]
        text = "".join(f"{json.dumps(line)}\n" for line in self.lines)
        write_text(self._path, text, own=_is_ours)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Counts the terms of one batch."""
        for name, term in terms.items():
            value = term.detach().float().reshape(())
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def write(
        self, step: int, mean: Callable[[Tensor], Tensor], *, writes: bool, **facts: Any
    ) -> None:
        """Ends a line with what was counted; a collective, if there are several processes.

        Args:
            step: steps done.
            mean: over the processes.
            writes: whether this process has the file.
            facts: what else the line says.

        Raises:
            NonFiniteError: if a term is NaN or infinite, in every process.
        """
        if not self._count:
            return
        values = mean(torch.stack([*self._sums.values()]) / self._count).tolist()
        losses = dict(zip(self._sums, values, strict=True))
        self._sums, self._count = {}, 0
        for name, value in losses.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the loss {name!r} became {value} by step {step}; lower the learning rate, "
                    "clip gradients, or look at the data and the checkpoint"
                )
        line = {"step": step, **facts, "loss": sum(values), "losses": losses}
        self.lines.append(line)
        if self._path is not None and writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_text(self._path, f"{json.dumps(line)}\n")


def _is_ours(path: Path) -> bool:
    """True for losses of any run; of one that was killed the first line may be cut short."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    return first.startswith(_BEGIN) or _BEGIN.startswith(first)


def _whole(text: str) -> list[dict[str, Any]]:
    """The lines up to the first that a run which was killed did not write to its end."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
