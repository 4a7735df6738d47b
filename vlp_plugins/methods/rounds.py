"""What methods of rounds and steps share: fresh batches, survivors, state files, costs."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from vlp_plugins.calibration.batches import batch_size, batches_again, chain_hash
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.method import Context, Cost, Factored, Procedure
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.request import Target
from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.sharding import is_sharded
from vlp_plugins.scoring.score import Evidence, Scorer

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
        return self._scorer.score(weight, evidence).masked_fill(~alive, self._dead)


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
    """Batches, recorded while they are read.

    Attributes:
        sizes: number of samples of each so far.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self._digest = b""
        self.sizes: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
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

    def _cost(self, context: Context, ram_bytes: int, disk_bytes: int = 0) -> Cost:
        steps, runs = self._steps(context), len(context.targets)
        return Cost(
            ram_bytes=ram_bytes,
            disk_bytes=disk_bytes,
            passes=runs * -(-steps // (context.number_of_batches() or steps)),
            gradient_batches=runs * steps,
            notes=(f"{steps} steps of one batch for each of {runs} sparsities",),
        )


_REMEDY = "delete it and run the method from its first round"
_FORMAT = Format("checkpoint", "vlp_rounds", 1, DataError, _REMEDY)
_STATE = "state|"  # no canonical name has a bar


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a round.

    Attributes:
        masks: what is kept so far; None before the first round.
        state: what the losses have changed; see `Adapter.loss_state`.
        seen: of every round the fingerprint of its batches and the number of samples in them;
            nothing of a method without data.
    """

    masks: Masks | None = None
    state: list[torch.Tensor] = field(default_factory=list)
    seen: tuple[tuple[str, int], ...] = ()
    rounds: int = 0


class RoundFile:
    """The file of one target. Process 0 writes and reads it, the others get what it read."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        """Finds the place of the file.

        Args:
            folder: None keeps no file.
            identity: what a run must have in common with the one it goes on from.
        """
        text = json.dumps(dict(identity), sort_keys=True, default=str)
        mark = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._identity = dict(identity)
        self.path = None if folder is None else Path(folder) / f"rounds-{mark}.safetensors"

    def save(self, progress: Progress) -> None:
        """Writes what a round led to over what the one before did, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        if self.path is None or rank_and_size()[0] or progress.masks is None:
            return
        state = {f"{_STATE}{index}": tensor for index, tensor in enumerate(progress.state)}
        header = {
            "identity": self._identity,
            "manifest": asdict(progress.masks.manifest),
            "rounds": progress.rounds,
            "seen": progress.seen,
        }
        tensors = {**progress.masks.packed, **state}
        write_artifact(self.path, _FORMAT, tensors, header, state=True)

    def load(self) -> Progress:
        """What to go on from, on the CPU; the state before the first round if there is no file.

        Raises:
            DataError: if there is no folder to look in, or the file is damaged.
        """
        if self.path is None:
            raise DataError(
                "resume needs the folder that the earlier run kept its rounds in; give workplace"
            )
        found = [Progress() if rank_and_size()[0] else self._read(self.path)]
        if rank_and_size()[1] > 1:
            distributed.broadcast_object_list(found)
        return found[0]

    def _read(self, path: Path) -> Progress:
        if not path.exists():
            logger.warning("no checkpoint at %s; starting from the first round", path)
            return Progress()
        tensors, header = read_artifact(path, _FORMAT)
        state = [name for name in tensors if name.startswith(_STATE)]
        bits = {name: bits for name, bits in tensors.items() if name not in state}
        return Progress(
            Masks(bits, Manifest.from_header(header["manifest"])),
            [tensors[f"{_STATE}{index}"] for index in range(len(state))],
            tuple((str(digest), int(samples)) for digest, samples in header["seen"]),
            int(header["rounds"]),
        )
