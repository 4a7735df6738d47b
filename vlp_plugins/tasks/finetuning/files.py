"""The state of a fine-tuning and the log of its losses, so that a run resumes bit by bit.

The random state is not in it: every batch sets a seed of its own, see `seed_of`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.artifacts import Format, checksum
from vlp_plugins.runtime.checkpoint import pack_moments, restore_moments, state_tensor
from vlp_plugins.runtime.errors import DataError, NonFiniteError
from vlp_plugins.runtime.files import append_text, check_own, write_text
from vlp_plugins.runtime.untrusted import read_as
from vlp_plugins.tasks.finetuning.engine import Engine

STATE_FILE = "finetuning.safetensors"
FORM = Format(
    "checkpoint", "vlp_finetuning", 1, DataError, "delete it and fine-tune from the first step"
)
_VALUE, _OWN = "value|", "own|"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run stands: steps done, the current epoch (from 0), and steps done in it."""

    step: int = 0
    epoch: int = 0
    group: int = 0


def state_of(
    model: nn.Module,
    optimizer: Optimizer,
    engine: Engine,
    place: Place,
    own: Sequence[Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Model, optimizer and place, as a checkpoint keeps them.

    `own` is by process what `own_buffers` returned there.
    """
    tensors = {f"{_VALUE}{name}": value.detach() for name, value in _values(model)}
    tensors |= pack_moments(optimizer, dict(model.named_parameters()))
    for index, buffers in enumerate(own):
        tensors |= {f"{_OWN}{index}|{name}": value for name, value in buffers.items()}
    return tensors, {"place": asdict(place), "engine": engine.state()}


def restore(
    tensors: dict[str, Tensor],
    content: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    engine: Engine,
    changing: Iterable[Tensor],
) -> Place:
    """Brings a run to where a state stands; see `state_of`.

    Raises:
        KeyError: if something is missing.
        ValueError: if a tensor has another shape than the model's.
    """
    with torch.no_grad():
        for name, value in _values(model):
            value.copy_(state_tensor(tensors, f"{_VALUE}{name}", value))
        for name, buffer in own_buffers(model, changing).items():
            buffer.copy_(state_tensor(tensors, f"{_OWN}{engine.index}|{name}", buffer))
    restore_moments(optimizer, dict(model.named_parameters()), tensors)
    engine.restore(read_as(dict[str, int | float], content["engine"], "engine"))
    return read_as(Place, content["place"], "place")


def seed_of(seed: int, step: int, batch: int) -> int:
    """The random seed of one batch, which does not depend on what was drawn before it."""
    digest = hashlib.sha256(f"{seed}|{step}|{batch}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def digest_of(masks: Masks | None) -> str | None:
    """Tells masks apart."""
    if masks is None:
        return None
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(checksum({"": masks[name]}).encode())
    return digest.hexdigest()[:16]


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers that are saved; a tied one once."""
    yield from model.named_parameters()
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def own_buffers(model: nn.Module, changing: Iterable[Tensor]) -> dict[str, Tensor]:
    """The buffers among what the losses change: those of every process are its own."""
    changed = {id(tensor) for tensor in changing}
    return {name: buffer for name, buffer in model.named_buffers() if id(buffer) in changed}


LOSSES_FILE = "losses.jsonl"
_BEGIN = '{"step": '


class LossLog:
    """Means of the terms of the loss over a few steps.

    A line has `step` (done so far), `epoch`, `learning_rate`, `loss`, the terms under `losses`, and
    `gradient_norm` if gradients are clipped.

    Attributes:
        lines: all of them, those of an interrupted run included.
    """

    def __init__(self, folder: Path | None) -> None:
        """Names the place; without a folder the lines are kept in memory."""
        self.lines: list[dict[str, Any]] = []
        self._path = None if folder is None else folder / LOSSES_FILE
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
        text = self._path.read_text(encoding="utf-8", errors="replace")
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
        """Ends a line with what was counted and other facts; a collective of several processes.

        The process that `writes` has the file; `mean` is taken over all.

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
    found: list[dict[str, Any]] = []
    for text_of_line in text.splitlines():
        try:
            line = json.loads(text_of_line)
            read_as(_Line, line, "a line")
        except (ValueError, RecursionError):
            break
        found.append(line)
    return found


class _Line(TypedDict):
    """What a line has in any case; `facts` of `LossLog.write` come on top."""

    step: int
    loss: float
    losses: dict[str, float]
