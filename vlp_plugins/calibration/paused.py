"""Forwards of a model that wait wherever a block is called, and what they wait with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from vlp_plugins.calibration.batches import batch_size
from vlp_plugins.calibration.tokens import first_argument
from vlp_plugins.models.adapter import Batch, Stream
from vlp_plugins.runtime.errors import OutputError, UnsupportedError, first_line


@dataclass(frozen=True, order=True)
class Visit:
    """One call of a block in the forward of a batch.

    Attributes:
        block: path of the module.
        turn: how many calls of it there were before in the same forward.
    """

    block: str
    turn: int = 0

    def __str__(self) -> str:
        return f"{self.block} (call {self.turn + 1})" if self.turn else self.block


class PausedForward(greenlet):
    """The forward of one batch: it waits at the entry of a block, or has ended (`dead`).

    Attributes:
        index: of the batch.
        samples: in it.
        stream: of the adapter, that runs.
        at: the visit that it waits at.
        call: the arguments of that.
        in_block: whether the block that it waits at is running.
    """

    stream: Stream
    at: Visit
    call: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(
        self,
        index: int,
        batch: Batch,
        streams: Callable[[Batch], Iterator[Stream]],
        store: HiddenStates,
    ) -> None:
        """Runs up to the first block.

        Args:
            index: of the batch.
            batch: on the model's device.
            streams: of the adapter.
            store: keeps what the forward waits with.
        """
        super().__init__(self._run)
        # What transformers keeps in context variables during a forward is this forward's own.
        self.gr_context = copy_context()
        self.index = index
        self.samples = batch_size(batch)
        self._batch = batch
        self._streams = streams
        self._store = store
        self._turns: Counter[str] = Counter()
        self.in_block = False
        self._go(None)

    def _run(self, _: Any) -> None:
        for stream in self._streams(self._batch):
            self.stream = stream
            stream.run()

    def _go(self, answer: Any) -> None:
        self.switch(answer)
        if not self.dead:
            self._store.keep(self.index, self.hidden)

    def _wait(self, block: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The call of a block, made in this forward: wait, run it as often as asked, return."""
        self.at = Visit(block, self._turns[block])
        self._turns[block] += 1
        self.call = args, kwargs
        answer = self.parent.switch()
        while answer is None:
            self.in_block = True
            try:
                output = forward(*args, **kwargs)
            finally:
                self.in_block = False
            answer = self.parent.switch(output)
        return answer[0]

    @property
    def given(self) -> list[torch.Tensor]:
        """The tensors that the block is called with."""
        args, kwargs = self.call
        return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]

    @property
    def hidden(self) -> torch.Tensor:
        """What the block is called with first; empty while it is on the disk, see `present`."""
        return first_argument(*self.call)

    def present(self) -> AbstractContextManager[None]:
        """What it waits with in memory, for a while."""
        return self._store.there(self.index, self.hidden)

    def run_block(self) -> Any:
        """What the block gives out; the forward still waits.

        Raises:
            UnsupportedError: if the block changes what it is called with.
        """
        with self.present():
            given = self.given
            versions = [tensor._version for tensor in given]
            output = self.switch(None)
            if [tensor._version for tensor in given] != versions:
                raise UnsupportedError(
                    f"block {self.at} changes its inputs in place, so that it cannot be run as it "
                    "is and then pruned; leave walk='blocks' out"
                )
        return output

    def proceed(self, output: Any) -> None:
        """Runs on behind the block, until the next one or the end."""
        self._store.bring_back(self.index, self.hidden)
        self._go((output,))

    def stop(self) -> None:
        """Ends it where it waits."""
        self.throw()


@contextmanager
def pausing(module: nn.Module, path: str) -> Iterator[None]:
    """Makes paused forwards wait where they call a module; other callers run it."""
    forward = module.forward
    own = "forward" in vars(module)

    @wraps(forward)  # some read its signature
    def waiting(*args: Any, **kwargs: Any) -> Any:
        caller = getcurrent()
        if isinstance(caller, PausedForward) and not caller.in_block:
            return caller._wait(path, forward, *args, **kwargs)
        return forward(*args, **kwargs)

    module.forward = waiting
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


class HiddenStates:
    """What forwards wait with: in memory as far as a budget allows, the others' on the disk.

    A tensor on the disk is still there, but empty, in the frames of the forward that holds it.
    """

    def __init__(self, budget: int | None, folder: Path | None) -> None:
        """Keeps up to `budget` bytes in memory (None: all), the rest below `folder`."""
        self._budget = budget
        self._folder = folder
        self._files: TemporaryDirectory[str] | None = None
        self._held: dict[int, int] = {}
        self._away: dict[int, torch.Size] = {}

    @contextmanager
    def open(self) -> Iterator[HiddenStates]:
        """Removes its files on leaving."""
        try:
            yield self
        finally:
            if self._files is not None:
                self._files.cleanup()

    def keep(self, index: int, states: torch.Tensor) -> None:
        """Takes what a forward waits with; writes it to the disk if there is no room.

        Raises:
            OutputError: if the disk is full.
        """
        if self._budget is None or not isinstance(states, torch.Tensor) or not states.numel():
            return
        room = sum(self._held.values()) + states.nbytes <= self._budget
        if room or isinstance(states, nn.Parameter):
            self._held[index] = states.nbytes
            return
        path = self._path(index)
        try:
            # A copy: NumPy would keep hold of the memory.
            copy = states.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            copy.view(-1).view(torch.uint8).numpy().tofile(path)
        except OSError as error:
            raise OutputError(
                f"hidden states of the batches do not fit into {path.parent} "
                f"({first_line(error)}); use fewer batches, or a larger memory_budget"
            ) from error
        self._away[index] = states.shape
        states.data = states.new_empty(0)

    def bring_back(self, index: int, states: torch.Tensor) -> None:
        """Brings into memory what a forward waits with, for good."""
        self._load(index, states)
        self._away.pop(index, None)
        self._held.pop(index, None)

    @contextmanager
    def there(self, index: int, states: torch.Tensor) -> Iterator[None]:
        """What a forward waits with in memory, for a while."""
        loaded = self._load(index, states)
        try:
            yield
        finally:
            if loaded:
                states.data = states.new_empty(0)

    def _load(self, index: int, states: torch.Tensor) -> bool:
        """Whether the states were on the disk alone."""
        if index not in self._away or states.numel():
            return False
        shape = self._away[index]
        found = torch.from_file(str(self._path(index)), size=shape.numel(), dtype=states.dtype)
        states.data = found.view(shape).to(states.device, copy=True)
        return True

    def _path(self, index: int) -> Path:
        if self._files is None:
            self._files = TemporaryDirectory(prefix="hidden-", dir=self._folder)
        return Path(self._files.name) / str(index)
