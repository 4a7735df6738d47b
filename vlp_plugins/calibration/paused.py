"""Forwards of a model that wait wherever a block is called, and what they wait with."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import wraps
from itertools import starmap
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Semaphore, Thread
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
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


class ForwardThread:
    """The thread in which paused forwards run, all entered from one place of its stack.

    A greenlet has the stack of its thread below it as it is when it runs, not as it was when it
    started. Torch walks the whole stack at every error, also at those that it catches itself, and
    crashes where frames have gone since. Here none have: `starmap` enters all of them, from C.
    """

    def __init__(self, state: Callable[[], AbstractContextManager[None]]) -> None:
        """Starts it.

        Args:
            state: of torch, which is each thread's own.
        """
        self._entries: SimpleQueue[tuple[PausedForward, object] | None] = SimpleQueue()
        self._waits = Semaphore(0)
        self._forwards: list[PausedForward] = []
        self._error: BaseException | None = None
        self.main: greenlet
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        run = copy_context().run
        self._thread = Thread(target=run, args=(self._run, state), name="vlp-walk", daemon=True)
        self._thread.start()
        self._wait()

    def _run(self, state: Callable[[], AbstractContextManager[None]]) -> None:
        self.main = getcurrent()
        try:
            with torch.cuda.device(self._device), state():  # -1 is none
                deque(starmap(greenlet.switch, self._entered()), maxlen=0)
        except BaseException as error:
            self._error = error
        finally:
            self._waits.release()

    def _entered(self) -> Iterator[tuple[PausedForward, object]]:
        self._waits.release()
        while (entry := self._entries.get()) is not None:
            yield entry
            del entry  # and with it what the block gives out
            self._waits.release()

    def _wait(self) -> None:
        try:
            self._waits.acquire()
        except BaseException:  # Ctrl-C: the model is in use until the forward waits
            self._waits.acquire()
            raise
        if self._error is not None:
            raise self._error

    def enter(self, forward: PausedForward, answer: object) -> None:
        """Runs a forward until it waits again, or ends."""
        if not forward:
            self._forwards.append(forward)
        self._entries.put((forward, answer))
        self._wait()

    def end(self) -> None:
        """Ends all forwards that wait, and the thread."""
        try:
            for forward in self._forwards:
                forward.stop()
        finally:
            self._entries.put(None)
            self._thread.join()


_STOP = object()


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
        thread: ForwardThread,
    ) -> None:
        """Runs up to the first block.

        Args:
            index: of the batch.
            batch: on the model's device.
            streams: of the adapter.
            store: keeps what the forward waits with.
            thread: runs it.
        """
        super().__init__(self._run, thread.main)
        # What transformers keeps in context variables during a forward is this forward's own.
        self.gr_context = copy_context()
        self.index = index
        self.samples = batch_size(batch)
        self._batch = batch
        self._streams = streams
        self._store = store
        self._thread = thread
        self._turns: Counter[str] = Counter()
        self._output: Any = None
        self._error: BaseException | None = None
        self.in_block = False
        self._go(None)

    def _run(self, _: Any) -> None:
        try:
            for stream in self._streams(self._batch):
                self.stream = stream
                stream.run()
        except GreenletExit:
            pass
        except BaseException as error:  # raised where the forward was entered
            self._error = error

    def _enter(self, answer: object) -> Any:
        """Runs on until it waits again, or ends; what the block has given out meanwhile."""
        self._thread.enter(self, answer)
        output, error = self._output, self._error
        self._output = self._error = None
        if error is not None:
            raise error
        return output

    def _go(self, answer: object) -> None:
        self._enter(answer)
        if not self.dead:
            self._store.keep(self.index, self.hidden)

    def _wait(self, block: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The call of a block, made in this forward: wait, run it as often as asked, return."""
        self.at = Visit(block, self._turns[block])
        self._turns[block] += 1
        self.call = args, kwargs
        while (answer := self.parent.switch()) is None:
            self.in_block = True
            try:
                self._output = forward(*args, **kwargs)
            finally:
                self.in_block = False
        if answer is _STOP:
            raise GreenletExit
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
            output = self._enter(None)
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
        if not self.dead:
            self._enter(_STOP)


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
