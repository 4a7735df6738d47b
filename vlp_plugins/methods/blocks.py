"""Compositions block by block: each block is pruned by what the pruned ones before it give out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vlp_plugins.calibration.batches import batches_again
from vlp_plugins.calibration.block_gradients import BlockGradients, GradientGroups
from vlp_plugins.calibration.block_pass import BlockPass, Decided
from vlp_plugins.calibration.block_sums import BlockStatistics
from vlp_plugins.calibration.moments import ActivationStatistic
from vlp_plugins.calibration.paused import Visit
from vlp_plugins.calibration.visits import largest_block_bytes, weights_by_block
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import Pruned, flaw
from vlp_plugins.methods.method import Context, Cost
from vlp_plugins.models.request import Target, new_values_bytes
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime import artifacts
from vlp_plugins.runtime.artifacts import Format, mapped_tensors, moved_to_disk
from vlp_plugins.runtime.checkpoint import Checkpoint, Content, Tensors
from vlp_plugins.runtime.distributed import all_gather, failing_together, rank_and_size
from vlp_plugins.runtime.errors import StatisticsError, UnsupportedError
from vlp_plugins.runtime.files import check_space
from vlp_plugins.runtime.mapped import release
from vlp_plugins.runtime.memory import local_processes, spill_folder, text_of
from vlp_plugins.runtime.untrusted import read_as
from vlp_plugins.scoring.score import Evidence
from vlp_plugins.scoring.selection import Scored, Selection
from vlp_plugins.scoring.threshold import Cut

if TYPE_CHECKING:
    from vlp_plugins.methods.composition import Composition

logger = logging.getLogger("vlp_plugins.methods")

_FORM = Format(
    "state of a walk",
    "vlp_walk",
    1,
    StatisticsError,
    "delete the folder of work and run the walk from the start",
)

_VALUES = "values|"


def masks_by_blocks(method: Composition, context: Context) -> list[Masks]:
    """Masks of a composition for every target, one walk over the blocks each.

    What compares tensors by a score of the data reads that from the dense model first, in a pass of
    its own.

    Raises:
        VlpError: see `BlockPass`, and `Composition.masks`.
    """
    weights = context.weights
    weights.check_finite()
    again = batches_again(context.batches, context.limit)
    blocks = BlockPass(
        context.model, context.adapter, weights, again(), published=context.published
    )
    # The state of a walk is that of its blocks: the pass before it is made again.
    dense = replace(
        context, batches=_Passes(again), walk="model", tokens=None, checkpoint=None, resume=False
    )
    counts = _counts(method, dense)
    identity = context.identity(weights.content_hash())
    groups = _gradient_groups(method, context, blocks, blocks.batches)
    gradients = None  # all walks share those that it keeps
    if groups is not None:
        gradients = BlockGradients(context.loss_probe(), weights, groups, again)
    walks = [
        _TargetWalk(method, context, blocks, identity, target, selections, gradients)
        for target, selections in zip(context.targets, counts, strict=True)
    ]
    with failing_together():
        # Each process has a file of its own.
        if needed := local_processes() * sum(walk.disk_bytes() for walk in walks):
            check_space(spill_folder(context.workplace), needed)
    found = [walk.run(number, len(walks)) for number, walk in enumerate(walks)]
    calibration = calibration_record(
        blocks.fingerprint, blocks.batches, blocks.samples, published=context.published
    )
    manifests = method.manifests(context, calibration)
    return [masks_of(each, manifest) for each, manifest in zip(found, manifests, strict=True)]


def masks_of(pruned: Mapping[str, Pruned], manifest: Manifest) -> Masks:
    """The masks of what was decided of every weight, with new values if there are any."""
    values = {name: each.values for name, each in pruned.items() if each.values is not None}
    return Masks({name: each.bits for name, each in pruned.items()}, manifest, values or None)


def calibration_record(
    fingerprint: str, batches: int, samples: int, *, published: bool
) -> dict[str, Any]:
    """What was read of the data, for manifests."""
    return {
        "fingerprint": fingerprint,
        "batches": batches,
        "samples": samples,
        "tokens": "real ones, by the adapter" + (" as in the published code" if published else ""),
    }


class _Passes:
    """Batches that can be read again."""

    def __init__(self, again: Callable[[], Any]) -> None:
        self._again = again

    def __iter__(self) -> Any:
        return self._again()


def cost_by_blocks(method: Composition, context: Context, blocks: BlockPass | None) -> Cost:
    """What walks over the blocks of a model need besides it, one for every target.

    Args:
        method: what prunes.
        context: of the run; `limit` says how many batches there will be.
        blocks: of the model, that read a batch; None where there is none yet.
    """
    names = context.adapter.blocks(context.model)
    block = largest_block_bytes(names, context.weights, _activations(method))
    first = int(method.allocation.compares and bool(method.allocating().needs))
    tokens = context.tokens or method.tokens
    runs = 2 if tokens is None or not tokens.runs_block else 3
    number = context.limit or 0
    waiting = _waiting_bytes(blocks, number)
    notes = [
        f"{len(names)} blocks, one after the other; each runs every batch {runs} times",
        f"{text_of(block)} for the statistics and the dense weights of the largest block"
        + (f", about {text_of(waiting)} for batches that wait" if waiting else ""),
        "a resumed run keeps the blocks that were pruned, and runs the batches through them",
    ]
    if first:
        notes.insert(0, "first a pass over the dense model, for what each tensor keeps")
    values = _values_bytes(method, context)
    stored = values if values >= artifacts.MAPPED else 0
    if stored:
        notes.append(f"{text_of(values)} of new values, on the disk from block to block")
    groups = _gradient_groups(method, context, blocks, number)
    passes = 0
    if groups is not None:
        several = len(groups.names) > 1
        passes = len(groups.names) * len(context.targets) if several else 1
        notes.append(
            f"{passes} pass{'es' * (passes > 1)} over the dense model, forward and backward, for "
            f"the gradients of {groups.rows} batches: {text_of(groups.held_bytes)} of them at a "
            f"time, and up to {text_of(groups.layer_bytes)} to solve a layer"
        )
    room = _room_to_wait(context, groups)
    held = waiting if room is None else min(waiting, room)
    rows = 0 if groups is None else groups.total_bytes
    return Cost(
        ram_bytes=block + held + rows + values - stored,
        disk_bytes=waiting - held + stored,
        passes=first + len(context.targets) + passes,
        gradient_batches=0 if groups is None else passes * groups.rows,
        forward_batches=number * (first + runs * len(context.targets)),
        notes=tuple(notes),
    )


def _values_bytes(method: Composition, context: Context) -> int:
    """What new values of all targets take; from `artifacts.MAPPED` on they go to the disk."""
    if not method.changes_weights:
        return 0
    return new_values_bytes(context.weights.values(), context.targets)


def _waiting_bytes(blocks: BlockPass | None, batches: int) -> int:
    """What batches wait with: each the input of a block, its output, and what comes back."""
    return 0 if blocks is None else 3 * batches * blocks.waiting_bytes


def _gradient_groups(
    method: Composition, context: Context, blocks: BlockPass | None, batches: int
) -> GradientGroups | None:
    """The gradients that a method asks for, of so many batches; None for none."""
    asked, weights = method.gradients(published=context.published), context.weights
    if asked is None:
        return None
    if blocks is not None:
        pruned = [blocks.pruned_at(visit) for visit in blocks.visits]
    else:  # taken to run in the adapter's order
        last: dict[str, str] = {}
        inside = weights_by_block(context.adapter.blocks(context.model), weights)
        for block, names in inside.items():
            last |= dict.fromkeys(names, block)
        pruned = [tuple(n for n in names if last[n] == block) for block, names in inside.items()]
    budget, waiting = context.memory_budget, _waiting_bytes(blocks, batches)
    return GradientGroups.of(asked, batches, pruned, weights, budget=budget, waiting=waiting)


def _room_to_wait(context: Context, groups: GradientGroups | None) -> int | None:
    """Bytes of the memory budget that gradients leave to batches that wait; None: as they need."""
    if context.memory_budget is None or groups is None:
        return context.memory_budget
    return max(0, context.memory_budget - groups.total_bytes)


def _counts(method: Composition, context: Context) -> Sequence[Mapping[str, Selection] | None]:
    """For every target how many elements each tensor loses, where tensors are compared.

    None where each tensor loses its own share.
    """
    if not method.allocation.compares:
        return [None] * len(context.targets)
    dense = method.allocating()
    statistics = dense.gather(context)
    return dense.selections(context, statistics)


@dataclass(frozen=True)
class _TargetWalk:
    """The walk for one target.

    Attributes:
        method: what prunes.
        context: of the run.
        blocks: of the model.
        identity: of the run, of whatever method.
        target: sparsity.
        selections: by canonical name what the dense model gave, where tensors are compared.
        gradients: takes those that the method asks for; None for none.
    """

    method: Composition
    context: Context
    blocks: BlockPass
    identity: Mapping[str, Any]
    target: Target
    selections: Mapping[str, Selection] | None
    gradients: BlockGradients | None

    def run(self, number: int, walks: int) -> dict[str, Pruned]:
        """What was decided of every weight.

        Args:
            number: of the walk, from 0, for `Context.progress`.
            walks: how many there are.
        """
        context, runs = self.context, len(self.blocks.visits) * self.blocks.batches
        known = self._resumed() if context.resume else {}
        found: dict[str, Pruned] = {}
        for each in known.values():
            found |= each.pruned

        def decide(
            visit: Visit, weights: Mapping[str, Weight], statistics: BlockStatistics
        ) -> Mapping[str, Pruned]:
            decided = Decided(self._decided(weights, statistics), statistics.left_out)
            file = self._file(visit)
            file.save(partial(_pack, decided))
            kept = self._stored(decided, file).pruned
            found.update(kept)
            return kept

        def progress(done: int, _: int | None) -> None:
            if context.progress is not None:
                context.progress(number * runs + done, walks * runs)

        self.blocks.run(
            _activations(self.method),
            decide,
            known=known,
            tokens=context.tokens or self.method.tokens,
            skip_nonfinite=context.skip_nonfinite,
            memory_budget=_room_to_wait(
                context, None if self.gradients is None else self.gradients.groups
            ),
            folder=context.workplace,
            progress=progress,
        )
        return found

    @property
    def stores_values(self) -> bool:
        """Whether new values go to the disk from block to block; a few stay in memory."""
        return _values_bytes(self.method, self.context) >= artifacts.MAPPED

    def disk_bytes(self) -> int:
        """What new values will take on the disk in files that are not there yet."""
        if not self.stores_values:
            return 0
        found = 0
        for visit in self.blocks.visits:
            path = self._file(visit).path
            if not self.context.resume or path is None or not path.exists():
                names = self.blocks.pruned_at(visit)
                found += new_values_bytes([self.context.weights[n] for n in names], [self.target])
        return found

    def _stored(self, decided: Decided, file: Checkpoint) -> Decided:
        """The same with new values in a file, that of the block in the process that writes it."""
        values = {name: each.values for name, each in decided.pruned.items()}
        held = {f"{_VALUES}{name}": each for name, each in values.items() if each is not None}
        if not held or not self.stores_values:
            return decided
        with failing_together():
            if file.path is not None and rank_and_size()[0] == 0:
                mapped = mapped_tensors(file.path, _VALUES)
            else:
                mapped = moved_to_disk(held, self.context.workplace)
        pruned = {
            name: replace(each, values=mapped.get(f"{_VALUES}{name}"))
            for name, each in decided.pruned.items()
        }
        return replace(decided, pruned=pruned)

    def _decided(
        self, weights: Mapping[str, Weight], statistics: BlockStatistics
    ) -> dict[str, Pruned]:
        """What the method makes of the weights of a block; processes divide them."""
        context, method = self.context, self.method
        rank, world = rank_and_size()
        mean = partial(statistics.mean, owners=context.resolved_owners)
        mine: dict[str, Weight] = {}
        for number, (name, weight) in enumerate(weights.items()):
            gathered = weight.gathered()  # by all, in the same order
            if number % world == rank:
                mine[name] = gathered
        # Copies, because weights that read the same inputs share a statistic.
        evidence = {
            name: Evidence(
                name, context.seed, {s.name: mean(s.name, name).clone() for s in method.read}
            )
            for name in mine
        }
        scored = Scored(method.score, mine, evidence, context.published)
        ranked = scored.ranking()
        rows: dict[str, torch.Tensor] = {}
        if self.gradients is not None:
            try:
                rows = self.gradients.rows_of(list(weights), mine)
            except UnsupportedError as error:
                asked = method.gradients(published=context.published)
                assert asked is not None
                raise UnsupportedError(f"{error}; {asked.instead}") from error
            release(context.model.parameters())
        found = {}
        with failing_together():
            chosen = {} if self.selections is not None else self._shares(scored)
            for name, weight in mine.items():
                scores = ranked.scores(name)
                rule = chosen[name] if self.selections is None else self.selections[name]
                if self.selections is not None and isinstance(rule, Cut):
                    rule = ranked.cuts_of(scores, [rule.remove])[0]
                found[name] = method.reduced(
                    context, weight, scores, [rule], mean, rows.pop(name, None)
                )[0]
        return {name: each for theirs in all_gather(found) for name, each in theirs.items()}

    def _shares(self, scored: Scored) -> dict[str, Selection]:
        """The selections of an allocation that compares nothing."""
        chosen: dict[str, Selection] = {}
        for modality in {weight.modality: None for weight in scored.weights.values()}:
            part = scored.subset([n for n, w in scored.weights.items() if w.modality == modality])
            budget = self.target
            if isinstance(budget, Mapping):
                budget = budget[modality]
            chosen |= self.method.allocation.select(part, [budget], floor=self.context.floor)[0]
        return chosen

    def _file(self, visit: Visit) -> Checkpoint:
        context, method = self.context, self.method
        tokens = context.tokens or method.tokens
        identity = {
            **self.identity,
            "method": method.name,
            "parameters": method.parameters,
            **method.allocation.record(),
            **({} if tokens is None else tokens.record()),
            "target": self.target,
            "floor": context.floor,
            "owners": context.resolved_owners,
            "seed": context.seed,
            "data": self.blocks.fingerprint,
            "block": str(visit),
        }
        name = f"block-{self.blocks.visits.index(visit):04}"
        return Checkpoint.of_run(context.workplace, name, _FORM, identity, unit="block")

    def _resumed(self) -> dict[Visit, Decided]:
        """What an earlier run decided, up to the block where it stopped."""
        known: dict[Visit, Decided] = {}
        for visit in self.blocks.visits:
            names = self.blocks.pruned_at(visit)
            if not names:
                continue
            weights = {name: self.context.weights[name] for name in names}
            file = self._file(visit)
            found = file.load(partial(_unpack, weights, values=self.method.changes_weights))
            if found is None:
                break
            known[visit] = self._stored(found, file)
        logger.info("resuming after %d blocks", len(known))
        return known


def _activations(method: Composition) -> list[ActivationStatistic]:
    """What a block must be measured for.

    Raises:
        UnsupportedError: if the method needs gradients.
    """
    found = [need for need in method.needs if isinstance(need, ActivationStatistic)]
    if len(found) < len(method.needs):
        raise UnsupportedError(
            f"method {method.name!r} needs gradients of the whole model's loss, which a block "
            "alone does not have; leave walk and tokens out"
        )
    return found


def _pack(decided: Decided) -> tuple[Tensors, Content]:
    tensors = {f"bits|{name}": each.bits for name, each in decided.pruned.items()}
    for name, each in decided.pruned.items():
        if each.values is not None:
            tensors[f"{_VALUES}{name}"] = each.values
    return tensors, {"left_out": sorted(decided.left_out)}


def _unpack(
    weights: Mapping[str, Weight], tensors: Tensors, content: Content, *, values: bool
) -> Decided:
    found = {}
    for name, weight in weights.items():
        bits = tensors[f"bits|{name}"]
        if wrong := flaw(bits, weight.shape):
            raise ValueError(f"the mask of {name!r} {wrong}")
        found[name] = Pruned(bits, tensors[f"{_VALUES}{name}"] if values else None)
    return Decided(found, frozenset(read_as(list[int], content["left_out"], "left_out")))
