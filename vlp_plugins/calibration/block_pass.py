"""The block-by-block pass: each block is measured and pruned on what the pruned ones before give.

Every batch runs the model's own forward, in a greenlet of its own that is paused where a block is
called. So masks, positions and what a model adds between its blocks are the model's own. One block
is at work at a time: all batches run it as it is, while its statistics are gathered; its weights
are pruned; all batches run it again and go on to the next one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import islice
from typing import Any, Literal

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from vlp_plugins.calibration.batches import (
    batch_size,
    chain_hash,
    check_batches,
    to_device,
    warn_if_fewer,
)
from vlp_plugins.calibration.moments import ActivationStatistic, Key
from vlp_plugins.calibration.probes import ActivationProbe
from vlp_plugins.calibration.selections import BlockCall, SelectionState, TokenSelection
from vlp_plugins.calibration.sums import sum_over_processes
from vlp_plugins.calibration.tokens import (
    check_reached,
    first_argument,
    kinds_of,
    modules_using,
    run_without_gradients,
)
from vlp_plugins.masks.packed import Pruned
from vlp_plugins.models.adapter import Adapter, Batch, Stream
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.distributed import all_gather, check_same, rank_and_size
from vlp_plugins.runtime.errors import DataError, NonFiniteError, StatisticsError, UnsupportedError
from vlp_plugins.runtime.model_state import caches_off, flags_kept

logger = logging.getLogger("vlp_plugins.calibration")


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


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over all batches for the weights of one visit.

    Attributes:
        sums: by statistic name and site, `[size]`.
        samples: that they are of.
    """

    sums: Mapping[Key, torch.Tensor]
    samples: int

    def mean(
        self, statistic: str, weight: str, *, owners: Literal["all", "first"] = "all"
    ) -> torch.Tensor:
        """A statistic of one weight, summed over its sites and divided by the samples; `[size]`.

        Raises:
            StatisticsError: if nothing was measured for it.
        """
        found = [
            total
            for (name, site), total in sorted(self.sums.items(), key=lambda item: item[0])
            if (name, site.weight) == (statistic, weight) and (owners == "all" or site.owner == 0)
        ]
        if not found:
            raise StatisticsError(
                f"no {statistic!r} was measured of weight {weight!r} at "
                f"{'its first owner' if owners == 'first' else 'any module that uses it'}"
            )
        total = found[0] if len(found) == 1 else torch.stack(found).sum(0)
        return total / self.samples


Decide = Callable[[Visit, Mapping[str, Weight], BlockStatistics], Mapping[str, Pruned]]
"""Prunes the weights whose last use a visit is, from their statistics."""

Progress = Callable[[int, int | None], None]


class _Forward(greenlet):
    """The forward of one batch: paused at the entry of a block, or ended (`dead`).

    Attributes:
        index: of the batch.
        samples: in it.
        stream: of the adapter, that runs.
        at: the visit that it waits at.
        call: the arguments of that.
    """

    stream: Stream
    at: Visit
    call: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(
        self, index: int, batch: Batch, streams: Callable[[Batch], Iterator[Stream]]
    ) -> None:
        super().__init__(self._run)
        # What transformers keeps in context variables during a forward is this forward's own.
        self.gr_context = copy_context()
        self.index = index
        self.samples = batch_size(batch)
        self.in_block = False
        self._batch = batch
        self._streams = streams
        self._turns: Counter[str] = Counter()

    def _run(self) -> None:
        for stream in self._streams(self._batch):
            self.stream = stream
            stream.run()

    def pause(self, block: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
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

    def run_block(self) -> Any:
        """What the block gives out; the forward still waits.

        Raises:
            UnsupportedError: if the block changes what it is called with.
        """
        args, kwargs = self.call
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        versions = [value._version for value in given]
        output = self.switch(None)
        if [value._version for value in given] != versions:
            raise UnsupportedError(
                f"block {self.at} changes its inputs in place, so that it cannot be run as it is "
                "and then pruned; leave walk='blocks' out"
            )
        return output

    def proceed(self, output: Any) -> None:
        """Runs on behind the block, until the next one or the end."""
        self.switch((output,))


class BlockPass:
    """Walks over the blocks of a model. The model is as it was found between two visits.

    Attributes:
        batches: number of batches that were read.
        samples: in these.
        fingerprint: hash of the batches in their order.
        visits: in the order in which blocks are pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        weights: WeightMap,
        batches: Iterable[Batch],
        *,
        published: bool = False,
        limit: int | None = None,
    ) -> None:
        """Reads the batches; the model runs the first of them, to see which block comes when.

        In a process group all processes get the same batches; each keeps and runs its own.

        Args:
            model: a model that `adapter` claims.
            adapter: of the model.
            weights: that are pruned.
            batches: any iterable; read once, up to `limit`.
            published: follow the published code where it departs from the idea.
            limit: number of batches to use; None uses all.

        Raises:
            DataError: if there are no batches, or processes read different ones.
            StatisticsError: if a weight is used by no block that runs.
            UnsupportedError: if the model is sharded.
        """
        if weights.sharded:
            raise UnsupportedError(
                "the model is sharded over processes, and walk='blocks' runs a block at a time in "
                "each of them; give every process the whole model, or take walk='model'"
            )
        check_batches(batches, limit)
        self._model, self._adapter, self._weights = model, adapter, weights
        self._published = published
        self._device = next(model.parameters()).device
        rank, world = rank_and_size()
        digest, self.batches, self.samples = b"", 0, 0
        self._kept: list[tuple[int, Batch]] = []
        for index, batch in enumerate(islice(batches, limit)):
            digest = chain_hash(digest, batch)
            self.batches += 1
            self.samples += batch_size(batch)
            if index % world == rank:
                self._kept.append((index, batch))
        if not self.batches:
            raise DataError("the calibration data is empty: no batch was read; check its path")
        warn_if_fewer(self.batches, limit)
        self.fingerprint = digest.hex()[:16]
        check_same(self.fingerprint, f"{self.batches} batches")
        self._blocks = tuple(adapter.blocks(model))
        self._inside = {
            block: tuple(
                name
                for name, weight in weights.items()
                if any(_is_in(owner.module, block) for owner in weight.owners)
            )
            for block in self._blocks
        }
        run_without_gradients(model, self._rehearse)

    def pruned_at(self, visit: Visit) -> tuple[str, ...]:
        """Canonical names of the weights whose last use a visit is."""
        return tuple(name for name in self._weights if self._last_use[name] == visit)

    def run(
        self,
        statistics: Sequence[ActivationStatistic],
        decide: Decide,
        *,
        known: Mapping[Visit, Mapping[str, Pruned]] | None = None,
        tokens: TokenSelection | None = None,
        skip_nonfinite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Walks over all blocks, once.

        Args:
            statistics: what is gathered of the inputs of every weight.
            decide: prunes the weights of a visit.
            known: what an earlier, interrupted walk decided; those visits are run as pruned.
            tokens: which of the real tokens count; None: all.
            skip_nonfinite: leave a batch out from the block on that gets NaN or infinity.
            progress: called with (batches that ran through a block, all of them).

        Raises:
            NonFiniteError: if an input of a weight holds NaN or infinity.
            VlpError: of `decide`.
        """
        probe = ActivationProbe(
            self._model, self._adapter, self._weights, statistics, published=self._published
        )
        dtypes = {statistic.name: statistic.block_dtype for statistic in statistics}
        walk = _Walk(probe, dtypes, tokens, skip_nonfinite)

        def run() -> None:
            with self._stopping(self._kept) as forwards, probe.attached():
                for number, visit in enumerate(self.visits, 1):
                    self._catch_up(forwards, number - 1, walk.decided)
                    waiting = [f for f in forwards if not f.dead and f.at == visit]
                    self._visit(visit, waiting, walk, decide, (known or {}).get(visit))
                    if progress is not None:
                        progress(number * self.batches, len(self.visits) * self.batches)

        run_without_gradients(self._model, run)

    def _catch_up(
        self, forwards: Sequence[_Forward], done: int, decided: Mapping[str, Pruned]
    ) -> None:
        """Runs what waits at a visit that is over, or was not foreseen, with what is decided."""
        ahead = set(self.visits[done:])
        for forward in forwards:
            while not forward.dead and forward.at not in ahead:
                with self._written(forward.at.block, decided):
                    output = forward.run_block()
                forward.proceed(output)

    def _visit(
        self,
        visit: Visit,
        forwards: list[_Forward],
        walk: _Walk,
        decide: Decide,
        known: Mapping[str, Pruned] | None,
    ) -> None:
        """Measures a block, prunes it, and runs all forwards on behind it."""
        names = self.pruned_at(visit)
        measured = set(self._inside[visit.block]) - walk.decided.keys()
        if known is not None:
            measured -= known.keys()
        if measured:
            self._measure(visit, forwards, walk, measured, go_on=not names)
        if not names:
            return
        if known is None:
            statistics = BlockStatistics(
                sum_over_processes(walk.taken(names), self._device),
                self.samples - sum(all_gather(walk.skipped)),
            )
            known = decide(visit, {name: self._weights[name] for name in names}, statistics)
        walk.decided.update(known)
        with self._written(visit.block, walk.decided):
            for forward in forwards:
                if not forward.dead:
                    forward.proceed(forward.run_block())

    def _measure(
        self,
        visit: Visit,
        forwards: list[_Forward],
        walk: _Walk,
        names: Collection[str],
        *,
        go_on: bool,
    ) -> None:
        """Adds the statistics of some weights of the unpruned block to the sums of the walk.

        Args:
            visit: of the block.
            forwards: that wait at it.
            walk: its sums.
            names: of the weights.
            go_on: whether the forwards go on behind the block as it is.
        """
        tokens = walk.tokens
        if tokens is not None and not self._is_mixed(visit, forwards):
            tokens = None
        state = None if tokens is None else tokens.begin()
        if tokens is not None and state is not None and tokens.reads_all_first:
            for forward in forwards:
                state.observe(self._call(visit, forward, tokens, names))
        for forward in forwards:
            if tokens is not None and state is not None and not tokens.reads_all_first:
                state.observe(self._call(visit, forward, tokens, names))
            chosen = None if state is None else partial(_chosen, state, forward.index, {})
            with walk.probe.reading(forward.stream, names, chosen):
                args, kwargs = forward.call
                walk.probe.enter(visit.block, args, kwargs)
                output = forward.run_block()
            try:
                walk.add(forward)
            except NonFiniteError as error:
                if not walk.skip_nonfinite:
                    raise
                logger.warning("left batch %d out: %s", forward.index, error)
                walk.skipped += forward.samples
                forward.throw()
                continue
            if go_on:
                forward.proceed(output)

    def _call(
        self, visit: Visit, forward: _Forward, tokens: TokenSelection, names: Collection[str]
    ) -> BlockCall:
        """A batch in a block, as token selections read it."""
        outputs: dict[str, torch.Tensor] = {}
        attention: list[torch.Tensor] = []
        with ExitStack() as stack:
            block = self._model.get_submodule(visit.block)
            if tokens.reads_modules:
                for _, module, uses in modules_using(self._model, self._weights):
                    own = [use.weight for use in uses if use.weight in names]
                    note = partial(_note_output, own, outputs)
                    stack.callback(module.register_forward_hook(note).remove)
            if tokens.reads_attention:
                for module in block.modules():
                    stack.callback(
                        module.register_forward_hook(partial(_note_attention, attention)).remove
                    )
            output = forward.run_block()
        output = output if isinstance(output, torch.Tensor) else output[0]
        return BlockCall(
            forward.index,
            self._kinds(visit, forward),
            first_argument(*forward.call),
            output,
            outputs,
            attention[0] if attention else None,
        )

    def _is_mixed(self, visit: Visit, forwards: Sequence[_Forward]) -> bool:
        """Whether a block reads several kinds of tokens, which a selection chooses among."""
        kinds = {kind for f in forwards for kind in self._kinds(visit, f).unique().tolist()}
        return len({kind for theirs in all_gather(kinds) for kind in theirs} - {0}) > 1

    def _kinds(self, visit: Visit, forward: _Forward) -> torch.Tensor:
        """The kinds of the hidden states that enter a block, uint8 `[batch, tokens]`."""
        hidden = first_argument(*forward.call)
        owner = next(
            owner
            for name in self._inside[visit.block]
            for owner in self._weights[name].owners
            if _is_in(owner.module, visit.block)
        )
        kinds = kinds_of(self._adapter, forward.stream, owner, hidden)
        if isinstance(kinds, torch.Tensor):
            return kinds
        return torch.full(hidden.shape[:-1], kinds, dtype=torch.uint8, device=hidden.device)

    @contextmanager
    def _stopping(self, batches: Iterable[tuple[int, Batch]]) -> Iterator[list[_Forward]]:
        """A forward of each batch, at its first block; what has not ended is ended afterwards."""
        forwards: list[_Forward] = []

        def streams(batch: Batch) -> Iterator[Stream]:
            return self._adapter.streams(self._model, batch, published=self._published)

        with flags_kept(self._model), caches_off(self._model), ExitStack() as stack:
            self._model.eval()
            for path in self._blocks:
                stack.enter_context(_pausing(self._model.get_submodule(path), path))
            try:
                for index, batch in batches:
                    forwards.append(_Forward(index, to_device(batch, self._device), streams))
                    forwards[-1].switch()
                yield forwards
            finally:
                for forward in forwards:
                    forward.throw()

    def _rehearse(self) -> None:
        """Finds the visits, and the last one that uses each weight, from as few batches as do."""
        uses: set[tuple[Visit, str]] = set()
        orders: list[list[Visit]] = []
        for kept in self._kept:
            orders.append(self._rehearse_batch(kept, uses))
            if {name for _, name in uses} == self._weights.keys():
                break
        found = all_gather((orders, uses))
        self.visits = _merged([order for theirs, _ in found for order in theirs])
        place = {visit: index for index, visit in enumerate(self.visits)}
        self._last_use: dict[str, Visit] = {}
        for visit, name in sorted(
            {use for _, theirs in found for use in theirs}, key=lambda use: place[use[0]]
        ):
            self._last_use[name] = visit
        check_reached(self._adapter, self._weights, self._last_use)
        self.visits = [visit for visit in self.visits if self._inside[visit.block]]

    def _rehearse_batch(self, kept: tuple[int, Batch], uses: set[tuple[Visit, str]]) -> list[Visit]:
        order = []
        with self._stopping([kept]) as (forward,), ExitStack() as stack:
            for path, module, users in modules_using(self._model, self._weights):
                if path not in self._inside:
                    note = partial(_note, forward, {use.weight for use in users}, uses)
                    stack.callback(module.register_forward_pre_hook(note).remove)
            while not forward.dead:
                order.append(forward.at)
                for name in self._inside[forward.at.block]:
                    if any(o.module == forward.at.block for o in self._weights[name].owners):
                        uses.add((forward.at, name))
                forward.proceed(forward.run_block())
        return order

    @contextmanager
    def _written(self, block: str, decided: Mapping[str, Pruned]) -> Iterator[None]:
        """The decided weights of a block pruned; afterwards they are as before."""
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for name in self._inside[block]:
                if name in decided:
                    parameter = self._weights[name].parameter.detach()
                    before.append((parameter, parameter.clone()))
                    decided[name].write(parameter)
            yield
        finally:
            for parameter, values in before:
                parameter.copy_(values)


@dataclass
class _Walk:
    """One walk.

    Attributes:
        probe: measures the inputs of weights.
        dtypes: of the sums of each statistic.
        tokens: which tokens count; None: all real ones.
        skip_nonfinite: whether batches are left out.
        decided: by canonical name.
        sums: of this process, of weights that are not decided yet.
        skipped: samples of this process that were left out.
    """

    probe: ActivationProbe
    dtypes: Mapping[str, torch.dtype]
    tokens: TokenSelection | None
    skip_nonfinite: bool
    decided: dict[str, Pruned] = field(default_factory=dict)
    sums: dict[Key, torch.Tensor] = field(default_factory=dict)
    skipped: int = 0

    def add(self, forward: _Forward) -> None:
        """Adds what the probe has measured of a batch to the sums.

        Raises:
            NonFiniteError: if an input holds NaN or infinity; nothing is added then.
        """
        found = self.probe.taken()
        for (_, site), owner, value in found:
            if not bool(torch.isfinite(value.sum())):
                raise NonFiniteError(
                    f"the input of {owner.module} (weight {site.weight!r}) holds NaN, infinity or "
                    f"values whose square overflows, in batch {forward.index}; look at that batch, "
                    "at the checkpoint (weights after a diverged training), or run the model in "
                    "float32"
                )
        for key, _, value in found:
            if key in self.sums:
                self.sums[key].add_(value)
            else:
                self.sums[key] = value.to(self.dtypes[key[0]], copy=True)

    def taken(self, names: Collection[str]) -> dict[Key, torch.Tensor]:
        """The sums of some weights, which are no longer kept here."""
        return {key: self.sums.pop(key) for key in sorted(self.sums) if key[1].weight in names}


def _is_in(path: str, block: str) -> bool:
    """Whether a module is a block, or in it."""
    return path == block or path.startswith(f"{block}.")


@contextmanager
def _pausing(module: nn.Module, path: str) -> Iterator[None]:
    """Makes forwards wait where they call a module; other callers run it."""
    forward = module.forward
    own = "forward" in vars(module)

    @wraps(forward)  # some read its signature
    def paused(*args: Any, **kwargs: Any) -> Any:
        caller = getcurrent()
        if isinstance(caller, _Forward) and not caller.in_block:
            return caller.pause(path, forward, *args, **kwargs)
        return forward(*args, **kwargs)

    module.forward = paused
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


def _note(forward: _Forward, names: set[str], uses: set[tuple[Visit, str]], *_: Any) -> None:
    """A hook that notes the visit in which a module is called."""
    if forward.in_block:
        uses.update((forward.at, name) for name in names)


def _note_output(
    names: Sequence[str],
    outputs: dict[str, torch.Tensor],
    _: nn.Module,
    __: Any,
    output: Any,
) -> None:
    """A hook that notes what a module gives out."""
    if isinstance(output, torch.Tensor):
        outputs.update(dict.fromkeys(names, output))


def _note_attention(found: list[torch.Tensor], _: nn.Module, __: Any, output: Any) -> None:
    """A hook that notes attention probabilities, which modules return behind their output."""
    if isinstance(output, tuple) and len(output) > 1:
        second = output[1]
        if isinstance(second, torch.Tensor) and second.ndim == 4:
            found.append(second)


def _chosen(
    state: SelectionState,
    sample: int,
    views: dict[tuple[int, torch.Size], tuple[torch.Tensor, torch.Tensor]],
    weight: str,
    inputs: torch.Tensor,
    real: torch.Tensor | None,
) -> torch.Tensor | None:
    """Which tokens of the input of a weight count; the same tensor for the same tokens."""
    selected = state.selected(sample, weight)
    lead = inputs.shape[:-1]
    if selected.shape == lead:
        return selected
    if selected.numel() != lead.numel():
        return real  # another sequence than that of the block
    key = id(selected), lead
    if key not in views:
        views[key] = selected, selected.view(lead)
    return views[key][1]


def _merged(orders: Sequence[Sequence[Visit]]) -> list[Visit]:
    """One order of all visits: that of the longest, others where they are called before it."""
    merged: list[Visit] = []
    for order in sorted(orders, key=len, reverse=True):
        place = len(merged)
        for visit in reversed(order):
            if visit in merged:
                place = merged.index(visit)
            else:
                merged.insert(place, visit)
    return merged
