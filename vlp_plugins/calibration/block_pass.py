"""The block-by-block pass: each block is measured and pruned on what the pruned ones before give.

Every batch runs the model's own forward, in a greenlet of its own that is paused where a block is
called. So masks, positions and what a model adds between its blocks are the model's own. One block
is at work at a time: all batches run it as it is, while its statistics are gathered; its weights
are pruned; all batches run it again and go on to the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.calibration.batches import (
    batch_size,
    chain_hash,
    check_batches,
    to_device,
    warn_if_fewer,
)
from vlp_plugins.calibration.block_sums import BlockStatistics, Sums
from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.calibration.moments import ActivationStatistic
from vlp_plugins.calibration.paused import (
    ForwardThread,
    HiddenStates,
    PausedForward,
    Visit,
    pausing,
)
from vlp_plugins.calibration.probes import ActivationProbe
from vlp_plugins.calibration.selections import (
    VISUAL,
    BlockCall,
    SelectionState,
    TokenSelection,
    check_selected,
)
from vlp_plugins.calibration.sums import sum_over_processes
from vlp_plugins.calibration.tokens import (
    check_reached,
    kinds_of,
    modules_using,
    without_gradients,
)
from vlp_plugins.calibration.visits import Rehearsal, is_in, weights_by_block
from vlp_plugins.masks.packed import Pruned
from vlp_plugins.models.adapter import Adapter, Batch, Stream, blocks_with
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.distributed import all_gather, check_same, failing_together, rank_and_size
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.mapped import places, release
from vlp_plugins.runtime.model_state import (
    caches_off,
    eager_attention,
    flags_kept,
    random_state_kept,
)
from vlp_plugins.runtime.offload import at_hand, device_of
from vlp_plugins.runtime.sharding import Gathering

logger = logging.getLogger("vlp_plugins.calibration")


@dataclass(frozen=True)
class Decided:
    """What an earlier walk found at a visit.

    Attributes:
        pruned: by canonical name.
        left_out: see `BlockStatistics`.
    """

    pruned: Mapping[str, Pruned]
    left_out: frozenset[int] = frozenset()


Decide = Callable[[Visit, Mapping[str, Weight], BlockStatistics], Mapping[str, Pruned]]
"""Prunes the weights whose last use a visit is, from their statistics."""


class BlockPass:
    """Walks over the blocks of a model. The model is as it was found between two visits.

    Attributes:
        batches: number of batches that were read.
        samples: in these.
        fingerprint: hash of the batches in their order.
        visits: in the order in which blocks are pruned.
        waiting_bytes: that the first batch waits with at most.
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
            UnsupportedError: if the model is split over processes in another way than by
                `fully_shard`.
        """
        check_batches(batches, limit)
        self._model, self._adapter, self._weights = model, adapter, weights
        self._published = published
        self._device = device_of(model)
        self._blocks = tuple(adapter.blocks(model))
        self._inside = weights_by_block(self._blocks, weights)
        mapped = zip(model.named_parameters(), places(model.parameters()), strict=True)
        owners = [path.rpartition(".")[0] for (path, _), place in mapped if place is not None]
        # What is run as it is, and may be as large as what is pruned.
        self._others = [path for path in blocks_with(model, owners) if path not in self._inside]
        self._gathering = Gathering(model, map(model.get_submodule, self._blocks))
        self.waiting_bytes = 0
        rank, world = rank_and_size()
        digest, self.batches, self.samples = b"", 0, 0
        self._kept: list[tuple[int, Batch]] = []
        rehearsal = Rehearsal()
        for index, batch in enumerate(islice(batches, limit)):
            digest = chain_hash(digest, batch)
            self.batches += 1
            self.samples += batch_size(batch)
            if index % world == rank:
                self._kept.append((index, batch))
            if not rehearsal.is_enough(weights):
                # Before they gather the same blocks one after the other.
                check_same(digest.hex()[:16], f"{self.batches} batches")
                self._rehearse(rehearsal, index, batch)
        if not self.batches:
            raise DataError("the calibration data is empty: no batch was read; check its path")
        warn_if_fewer(self.batches, limit)
        self.fingerprint = digest.hex()[:16]
        check_same(self.fingerprint, f"{self.batches} batches")
        order = rehearsal.order
        check_reached(adapter, weights, {name for _, name in rehearsal.uses})
        self._last_use = dict.fromkeys(weights, order[0])
        for visit, name in rehearsal.uses:
            self._last_use[name] = max(self._last_use[name], visit, key=order.index)
        self.visits = [visit for visit in order if self._inside[visit.block]]

    def pruned_at(self, visit: Visit) -> tuple[str, ...]:
        """Canonical names of the weights whose last use a visit is, in the adapter's order."""
        return tuple(name for name in self._weights if self._last_use[name] == visit)

    def run(
        self,
        statistics: Sequence[ActivationStatistic],
        decide: Decide,
        *,
        known: Mapping[Visit, Decided] | None = None,
        tokens: TokenSelection | None = None,
        skip_nonfinite: bool = False,
        memory_budget: int | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Walks over all blocks, once.

        Args:
            statistics: what is gathered of the inputs of every weight.
            decide: prunes the weights of a visit.
            known: what an earlier, interrupted walk decided; those visits are run as pruned.
            tokens: which of the real tokens count; None: all.
            skip_nonfinite: leave a batch out from the block on that gets NaN or infinity.
            memory_budget: bytes of the tensors that batches wait with between two blocks; those of
                the others are on the disk. None: all in memory.
            folder: for these files, which are removed at the end; None: that of the system.
            progress: called with (batches that ran through a block, all of them).

        Raises:
            NonFiniteError: if an input of a weight holds NaN or infinity.
            VlpError: of `decide`.
        """
        probe = ActivationProbe(
            self._model, self._adapter, self._weights, statistics, published=self._published
        )
        dtypes = {statistic.name: statistic.block_dtype for statistic in statistics}
        walk = Sums(probe, dtypes, tokens, skip_nonfinite)
        store = HiddenStates(memory_budget, folder)

        reads = tokens is not None and tokens.reads_attention
        eager = eager_attention(self._model) if reads else nullcontext()
        with eager, self._forwards(self._kept, store) as forwards, probe.attached():
            for number, visit in enumerate(self.visits, 1):
                self._catch_up(forwards, number - 1, walk.decided)
                waiting = [f for f in forwards if not f.dead and f.at == visit]
                # What ran until here: embeddings, what is between blocks, the block before.
                release(self._model.parameters())
                self._visit(visit, waiting, walk, decide, (known or {}).get(visit))
                self._release(visit.block)
                if progress is not None:
                    progress(number * self.batches, len(self.visits) * self.batches)
            with failing_together():
                for forward in forwards:
                    if not forward.dead:
                        self._check_foreseen(forward)

    def _catch_up(
        self, forwards: Sequence[PausedForward], done: int, decided: Mapping[str, Pruned]
    ) -> None:
        """Runs what waits at a visit that is over, or was not foreseen, with what is decided."""
        ahead = set(self.visits[done:])
        while True:
            waiting: dict[Visit, list[PausedForward]] = {}
            for forward in forwards:
                if not forward.dead and forward.at not in ahead:
                    waiting.setdefault(forward.at, []).append(forward)
            # All processes gather the same blocks.
            visits = sorted({visit for theirs in all_gather(list(waiting)) for visit in theirs})
            if not visits:
                return
            for visit in visits:
                with self._gathered(visit.block), failing_together():
                    some = waiting.get(visit, [])
                    for forward in some:
                        self._check_foreseen(forward)
                    with self._written(visit.block, decided):
                        for forward in some:
                            forward.proceed(forward.run_block())
                self._release(visit.block)

    def _check_foreseen(self, forward: PausedForward) -> None:
        """Raises `UnsupportedError` for a call of a block that no batch before made."""
        if self._inside[forward.at.block] and forward.at not in self.visits:
            raise UnsupportedError(
                f"batch {forward.index} calls block {forward.at.block} {forward.at.turn + 1} "
                "times, more often than the batches before it, so that what the block reads then "
                "would count in no statistics; put that batch first, or take walk='model'"
            )

    def _visit(
        self,
        visit: Visit,
        forwards: list[PausedForward],
        walk: Sums,
        decide: Decide,
        known: Decided | None,
    ) -> None:
        """Measures a block, prunes it, and runs all forwards on behind it."""
        names = self.pruned_at(visit)
        measured = set(self._inside[visit.block]) - walk.decided.keys()
        if known is not None:
            measured -= known.pruned.keys()
            for forward in forwards:
                if forward.index in known.left_out:
                    walk.leave_out(forward)
            forwards = [forward for forward in forwards if not forward.dead]
        if measured:
            with self._gathered(visit.block):
                self._measure(visit, forwards, walk, measured, go_on=not names)
        if not names:
            return
        pruned = None if known is None else known.pruned
        if pruned is None:
            left_out = frozenset().union(*all_gather(list(walk.left_out)))
            samples = self.samples - sum(all_gather(sum(walk.left_out.values())))
            sums = sum_over_processes(walk.taken(names), self._device)
            chosen = {name: self._weights[name] for name in names}
            with self._gathering.suspended():
                pruned = decide(visit, chosen, BlockStatistics(sums, samples, left_out))
        walk.decided.update(pruned)
        with (
            self._gathered(visit.block),
            failing_together(),
            self._written(visit.block, walk.decided),
        ):
            for forward in forwards:
                if not forward.dead:
                    forward.proceed(forward.run_block())

    def _measure(
        self,
        visit: Visit,
        forwards: list[PausedForward],
        walk: Sums,
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
        state = None if tokens is None else tokens.begin(published=self._published)
        if tokens is not None and state is not None and tokens.reads_all_first:
            with failing_together():
                for forward in forwards:
                    with forward.present():
                        state.observe(self._call(visit, forward, tokens, names))
            state.agree()
        with failing_together():
            for forward in forwards:
                chosen = None
                if tokens is not None and state is not None:
                    chosen = partial(_chosen, tokens.name, state, forward, {})
                with forward.present():
                    if tokens is not None and state is not None and not tokens.reads_all_first:
                        state.observe(self._call(visit, forward, tokens, names))
                    with walk.probe.reading(forward.stream, names, chosen):
                        walk.probe.enter(visit.block, *forward.call)
                        output = forward.run_block()
                walk.take(forward)
                if go_on and not forward.dead:
                    forward.proceed(output)

    def _call(
        self, visit: Visit, forward: PausedForward, tokens: TokenSelection, names: Collection[str]
    ) -> BlockCall:
        """A batch in a block, as token selections read it."""
        outputs: dict[str, torch.Tensor] = {}
        attention: list[torch.Tensor] = []
        lead = forward.hidden.shape[:-1]

        def shaped(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[: len(lead)] != lead:
                return tensor
            return tensor.reshape(*_by_sample(forward), *tensor.shape[len(lead) :])

        kinds, hidden = shaped(self._kinds(visit, forward)), shaped(forward.hidden)
        if not tokens.runs_block:
            return BlockCall(forward.index, kinds, hidden, hidden[..., :0])
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
            kinds,
            hidden,
            shaped(output),
            {name: shaped(found) for name, found in outputs.items()},
            attention[0] if attention else None,
        )

    def _is_mixed(self, visit: Visit, forwards: Sequence[PausedForward]) -> bool:
        """Whether a block reads several kinds of tokens, which a selection chooses among."""
        kinds = {kind for f in forwards for kind in self._kinds(visit, f).unique().tolist()}
        # A vision tower reads images of one batch and videos of another.
        kinds = {VISUAL[0] if kind in VISUAL else kind for kind in kinds}
        return len({kind for theirs in all_gather(kinds) for kind in theirs} - {0}) > 1

    def _kinds(self, visit: Visit, forward: PausedForward) -> torch.Tensor:
        """The kinds of the hidden states that enter a block, uint8 `[batch, tokens]`."""
        owner = next(
            owner
            for name in self._inside[visit.block]
            for owner in self._weights[name].owners
            if is_in(owner.module, visit.block)
        )
        with forward.present():
            hidden = forward.hidden
            kinds = kinds_of(self._adapter, forward.stream, owner, hidden)
            if isinstance(kinds, torch.Tensor):
                return kinds
            return torch.full(hidden.shape[:-1], kinds, dtype=torch.uint8, device=hidden.device)

    @contextmanager
    def _forwards(
        self, batches: Iterable[tuple[int, Batch]], store: HiddenStates
    ) -> Iterator[list[PausedForward]]:
        """A forward of each batch, at its first block; what has not ended is ended afterwards."""
        forwards: list[PausedForward] = []

        def streams(batch: Batch) -> Iterator[Stream]:
            return self._adapter.streams(self._model, batch, published=self._published)

        with (
            random_state_kept(self._device),
            without_gradients(self._model),
            at_hand(self._model),
            self._gathering.open(),
            flags_kept(self._model),
            caches_off(self._model),
            store.open(),
            ExitStack() as stack,
        ):
            self._model.eval()
            for path in self._blocks:
                stack.enter_context(pausing(self._model.get_submodule(path), path))
            for path in self._others:
                module = self._model.get_submodule(path)
                stack.callback(module.register_forward_hook(partial(self._release, path)).remove)
            thread = ForwardThread(partial(without_gradients, self._model))
            stack.callback(thread.end)
            with failing_together():
                for index, batch in batches:
                    moved = to_device(batch, self._device)
                    forwards.append(PausedForward(index, moved, streams, store, thread))
            yield forwards

    def _rehearse(self, rehearsal: Rehearsal, index: int, batch: Batch) -> None:
        """Runs a batch, to see in which order it calls the blocks, and which weights they use."""
        order: list[Visit] = []
        store = HiddenStates(None, None)
        with self._forwards([(index, batch)], store) as (forward,), ExitStack() as stack:
            for path, module, users in modules_using(self._model, self._weights):
                if path not in self._inside:
                    names = {use.weight for use in users}
                    note = partial(_note, forward, names, rehearsal.uses)
                    stack.callback(module.register_forward_pre_hook(note).remove)
            while not forward.dead:
                order.append(forward.at)
                self.waiting_bytes = max(self.waiting_bytes, sum(t.nbytes for t in forward.given))
                for name in self._inside[forward.at.block]:
                    if any(o.module == forward.at.block for o in self._weights[name].owners):
                        rehearsal.uses.add((forward.at, name))
                with self._gathered(forward.at.block):
                    output = forward.run_block()
                self._release(forward.at.block)
                forward.proceed(output)
        rehearsal.orders.append(order)

    @contextmanager
    def _written(self, block: str, decided: Mapping[str, Pruned]) -> Iterator[None]:
        """The decided weights of a block pruned; afterwards they are as before."""
        weights = {
            name: self._weights[name].within(self._model)
            for name in self._inside[block]
            if name in decided
        }
        with ExitStack() as stack:
            # All before any is written: weights that are views of a file may share a page.
            for restore in [weight.kept() for weight in weights.values()]:
                stack.callback(restore)
            for name, weight in weights.items():
                with weight.changing() as parameter:
                    decided[name].write(parameter.detach())
            yield

    def _gathered(self, block: str) -> AbstractContextManager[None]:
        """A block that may run in this process; a collective if the model is sharded."""
        return self._gathering.of(self._model.get_submodule(block))

    def _release(self, block: str, *_: object) -> None:
        """Gives back the memory of a block whose values are in a file; also as a forward hook."""
        release(self._model.get_submodule(block).parameters())


def _note(forward: PausedForward, names: set[str], uses: set[tuple[Visit, str]], *_: Any) -> None:
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


def _by_sample(forward: PausedForward) -> torch.Size:
    """`[batch, tokens]` of the hidden states, which may have the tokens of all samples in a row."""
    lead = forward.hidden.shape[:-1]
    in_a_row = len(lead) == 1 and lead[0] % forward.samples == 0
    return torch.Size((forward.samples, lead[0] // forward.samples)) if in_a_row else lead


def _chosen(
    name: str,
    state: SelectionState,
    forward: PausedForward,
    views: dict[tuple[int, torch.Size], tuple[torch.Tensor, torch.Tensor]],
    weight: str,
    inputs: torch.Tensor,
    real: torch.Tensor | None,
) -> torch.Tensor | None:
    """Which tokens of the input of a weight count; the same tensor for the same tokens."""
    selected = state.selected(forward.index, weight)
    check_selected(selected, _by_sample(forward), name, weight)
    lead = inputs.shape[:-1]
    if selected.shape == lead:
        return selected
    if selected.numel() != lead.numel():
        return real  # another sequence than that of the block
    key = id(selected), lead
    if key not in views:
        views[key] = selected, selected.view(lead)
    return views[key][1]
