"""Methods in rounds and steps: their loops, checkpoints and fresh batches."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch

from vlp_plugins.calibration.batches import batch_size, batches_again, chain_hash
from vlp_plugins.calibration.loss import loss_state_kept, write_state
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.method import Context, Cost, Factored, Procedure
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.request import Target
from vlp_plugins.models.saving import restored
from vlp_plugins.runtime.artifacts import Format
from vlp_plugins.runtime.checkpoint import Checkpoint, state_tensor
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.sharding import is_sharded
from vlp_plugins.runtime.untrusted import read_as
from vlp_plugins.scoring.schedules import levels_of
from vlp_plugins.scoring.score import Evidence, Scorer, scores_of

Found = TypeVar("Found")

LEAST = torch.finfo(torch.float32).min
"""Below every score. Finite, because an infinite score is a mistake of a scorer."""


class Survivors(Scorer):
    """Another score, with removed elements below all others.

    The score of a removed element, |g * 0| say, may be no less than that of one that is kept.
    """

    name = "survivors"
    elementwise = False  # a sample of a weight does not tell which elements it is of

    def __init__(
        self, scorer: Scorer, alive: Mapping[str, torch.Tensor], dead: float = LEAST
    ) -> None:
        """Wraps a scorer.

        Args:
            scorer: ranks what is kept so far.
            alive: by canonical name a bool mask of the weight's shape, true where it is kept.
            dead: score of the rest; 0 in the published code.
        """
        self.name = scorer.name  # type: ignore[misc]
        self.needs = scorer.needs  # type: ignore[misc]
        self._dead = dead
        self._scorer = scorer
        self._alive = alive

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        alive = self._alive[evidence.name].to(weight.device).view(weight.shape)
        return scores_of(self._scorer, weight, evidence).masked_fill(~alive, self._dead)


logger = logging.getLogger("vlp_plugins.methods")


class FreshBatches:
    """The batches one after another, up to `limit` of them; after the last the first again."""

    def __init__(self, batches: Iterable[Batch], limit: int | None = None) -> None:
        self._again = batches_again(batches, limit)
        self._running: Iterator[Batch] | None = None
        self._warned = False

    def restart(self) -> None:
        """The next batch is the first."""
        self._running = None

    def take(self, count: int) -> Iterator[Batch]:
        """The next batches; `DataError` if there are none, or they cannot be read again."""
        for _ in range(count):
            if self._running is None:
                self._running = self._again()
            batch = next(self._running, None)
            if batch is None:
                if not self._warned:
                    logger.warning(
                        "the calibration data is shorter than all rounds or steps together: after "
                        "its last batch comes the first again"
                    )
                self._warned = True
                self._running = self._again()
                batch = next(self._running)
            yield batch


class RecordedBatches:
    """Batches that can be iterated again, recorded when they are first read.

    Attributes:
        sizes: number of samples of each so far.
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self._batches = batches
        self._digest = b""
        self.sizes: list[int] = []

    def __call__(self) -> Iterator[Batch]:
        for index, batch in enumerate(self._batches()):
            if index == len(self.sizes):
                self._digest = chain_hash(self._digest, batch)
                self.sizes.append(batch_size(batch))
            yield batch

    @property
    def digest(self) -> str:
        """Hash of all batches so far, in their order, hexadecimal."""
        return self._digest.hex()

    def calibration(self) -> dict[str, Any]:
        """For the manifest of masks."""
        return {
            "fingerprint": self.digest[:16],
            "batches": len(self.sizes),
            "samples": sum(self.sizes),
        }


class Stepwise(Factored, Procedure):
    """A procedure of one step per batch; every target starts from the dense model and first batch.

    Attributes:
        steps: number of steps; None: one per batch of the data.
        lr: learning rate of the first step, which falls linearly to zero; None: a default.
    """

    steps: int | None
    lr: float | None
    trains: ClassVar[bool] = True
    takes_gradients = True
    relative_cost = "3 per sparsity"

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise DataError(f"steps={self.steps}; use 1 or more, or None for one per batch")
        if self.lr is not None and not self.lr > 0:
            raise UnsupportedError(f"lr={self.lr}; a learning rate is above 0")

    def run(self, context: Context) -> list[Masks]:
        if is_sharded(context.model.parameters()):
            raise UnsupportedError(
                f"{self.name} keeps whole weights on every process and does not run on a model "
                "that fully_shard has divided; give the model as it was loaded"
            )
        batches = FreshBatches(context.batches, context.limit)
        return [
            self._masks(context, target, batches, number)
            for number, target in enumerate(context.targets)
        ]

    @abstractmethod
    def _masks(self, context: Context, target: Target, batches: FreshBatches, number: int) -> Masks:
        """Masks of the target with that number."""

    def _steps(self, context: Context) -> int:
        return self.steps or context.known_number_of_batches(
            "steps", "sparsity or learning rate depend on the last step"
        )

    def _report(self, context: Context, number: int, done: int) -> None:
        """Progress after so many steps for the target with that number."""
        if context.progress is not None:
            steps = self._steps(context)
            context.progress(number * steps + done, len(context.targets) * steps)

    def _cost(self, context: Context, ram_bytes: int, disk_bytes: int = 0, every: int = 1) -> Cost:
        """The cost of a method that chooses masks after so many steps."""
        steps, runs = self._steps(context), len(context.targets)
        return Cost(
            ram_bytes=ram_bytes,
            disk_bytes=disk_bytes,
            passes=runs * -(-steps // (context.number_of_batches() or steps)),
            gradient_batches=runs * steps,
            choices=runs * -(-steps // every),
            notes=(f"{steps} steps of one batch for each of {runs} sparsities",),
        )


class InRounds(Procedure):
    """A method that prunes a little, measures the pruned model again, and prunes a little more.

    Attributes:
        rounds: number of rounds.
        schedule: name of what leads from 0 to the target; see `vlp_plugins.scoring.schedules`.
    """

    rounds: int
    schedule: str


@dataclass(frozen=True)
class Progress(Generic[Found]):
    """Where a run stands after a round.

    Attributes:
        found: by the last round; None before the first.
        digests: by round, the hash of its batches, hexadecimal; empty text without batches.
        sizes: by round, the number of samples of each of its batches.
    """

    found: Found | None = None
    digests: tuple[str, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()

    @property
    def rounds(self) -> int:
        """Number of rounds done."""
        return len(self.digests)

    def after(self, found: Found, batches: RecordedBatches) -> Progress[Found]:
        """After one more round, which has read these batches."""
        return Progress(found, (*self.digests, batches.digest), (*self.sizes, tuple(batches.sizes)))


_STATE = "state|"  # no canonical name has a bar


@dataclass(frozen=True)
class RunInRounds(ABC, Generic[Found]):
    """All rounds of one target. The loop is here; a method says what a round does and finds.

    Attributes:
        unit: what the method calls a round.
        method: what is run, and how.
        context: of the run.
        number: index of the target.
        per_round: number of batches of a round; 0 for a method without data.
        dense: content hash of the weights before all rounds.
    """

    unit: ClassVar[str] = "round"

    method: InRounds
    context: Context
    number: int
    per_round: int
    dense: str

    @abstractmethod
    def batches(self, index: int) -> RecordedBatches:
        """The batches of a round; rounds are asked for in their order."""

    @abstractmethod
    def round(
        self, index: int, level: Target, batches: RecordedBatches, before: Found | None
    ) -> Found:
        """What a round finds in the model as the one before left it.

        Args:
            index: of the round.
            level: sparsity after it.
            batches: for its statistics.
            before: what the round before found; None in the first.
        """

    @abstractmethod
    def write(self, found: Found) -> None:
        """Gives the model the weights that a round found."""

    @abstractmethod
    def pack(self, found: Found) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a round found as tensors and JSON."""

    @abstractmethod
    def unpack(self, tensors: dict[str, torch.Tensor], content: Mapping[str, Any]) -> Found:
        """Inverse of `pack`; the tensors are on the CPU."""

    @abstractmethod
    def result(self, found: Found, progress: Progress[Found]) -> Masks:
        """The masks of the last round, with what the whole run was."""

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes."""
        context, method = self.context, self.method
        return {
            "method": method.name,
            "parameters": method.parameters,
            **method.allocation.record(),
            "target": self.target,
            "batches of a round": self.per_round,
            **context.identity(self.dense),
        }

    @property
    def target(self) -> Target:
        """The sparsity after the last round."""
        return self.context.targets[self.number]

    def checkpoint(self) -> Checkpoint:
        """The file that keeps the run after every round."""
        remedy = f"delete it and run the method from its first {self.unit}"
        form = Format("checkpoint", f"vlp_{self.unit}s", 2, DataError, remedy)
        return Checkpoint.of_run(
            self.context.workplace, f"{self.unit}s", form, self.identity(), unit=self.unit
        )

    def masks(self) -> Masks:
        """Runs all rounds from the dense model on; it is as before at the end, or after an error.

        What the losses change (BLIP's queues and momentum copies) is kept from round to round.

        Raises:
            DataError: if the checkpoint to resume from is of other batches, or damaged.
        """
        context, method = self.context, self.method
        file = self.checkpoint()
        levels = levels_of(self.target, method.schedule, method.rounds)
        with restored(context.weights), loss_state_kept(context.model, context.adapter):
            progress = self._resumed(file) if context.resume else Progress[Found]()
            for index in range(progress.rounds, method.rounds):
                batches = self.batches(index)
                found = self.round(index, levels[index], batches, progress.found)
                self.write(found)
                progress = progress.after(found, batches)
                file.save(partial(self._packed, found, progress))
        assert progress.found is not None  # there is at least one round
        return self.result(progress.found, progress)

    def progress(self, index: int) -> Callable[[int, int | None], None] | None:
        """Called by a round with (batches of it done, in all); reports those of the whole run."""
        progress = self.context.progress
        if progress is None:
            return None
        before = (self.number * self.method.rounds + index) * self.per_round
        total = len(self.context.targets) * self.method.rounds * self.per_round
        return lambda done, _: progress(before + done, total)

    def _packed(
        self, found: Found, progress: Progress[Found]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors, content = self.pack(found)
        changed = self.context.adapter.loss_state(self.context.model)
        state = {f"{_STATE}{index}": tensor for index, tensor in enumerate(changed)}
        seen = {"digests": progress.digests, "sizes": progress.sizes}
        return {**tensors, **state}, {**content, **seen}

    def _unpacked(
        self, tensors: dict[str, torch.Tensor], content: dict[str, Any]
    ) -> tuple[Progress[Found], list[torch.Tensor]]:
        mine = enumerate(self.context.adapter.loss_state(self.context.model))
        state = [state_tensor(tensors, f"{_STATE}{index}", tensor) for index, tensor in mine]
        found = {name: each for name, each in tensors.items() if not name.startswith(_STATE)}
        sizes = read_as(tuple[tuple[int, ...], ...], content["sizes"], "sizes")
        digests = read_as(tuple[str, ...], content["digests"], "digests")
        if len(digests) > self.method.rounds:
            raise ValueError(f"{len(digests)} of {self.method.rounds} rounds are done")
        return Progress(self.unpack(found, content), digests, sizes), state

    def _resumed(self, file: Checkpoint) -> Progress[Found]:
        """Brings the model to where the checkpoint stands, past the batches before that."""
        loaded = file.load(self._unpacked)
        if loaded is None:
            return Progress()
        progress, state = loaded
        for index, digest in enumerate(progress.digests):
            batches = self.batches(index)
            for _ in batches():
                pass
            if batches.digest != digest:
                raise DataError(
                    f"the batches of round {index + 1} are not those that checkpoint {file.path} "
                    "has seen; give the same data in the same order, or delete the checkpoint and "
                    "start again"
                )
        assert progress.found is not None  # it was saved after a round
        self.write(progress.found)
        write_state(self.context.model, self.context.adapter, state)
        logger.info("%s resumes after round %d", self.method.name, progress.rounds)
        return progress
