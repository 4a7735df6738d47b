"""The state of a data pass, kept in a file so that a pass can be interrupted and resumed."""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from vlp_plugins.calibration.batches import DIGEST_BYTES
from vlp_plugins.calibration.statistic import LOSS_STREAM, Key, Statistic
from vlp_plugins.calibration.statistics import (
    is_statistics_file,
    pack_sums,
    read_statistics,
    unpack_sums,
    write_statistics,
)
from vlp_plugins.calibration.sums import Tally
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import StatisticsError
from vlp_plugins.runtime.files import check_own

logger = logging.getLogger("vlp_plugins.calibration")

_REMEDY = "delete it and run the pass from the start"
_HASHES = "batch_hashes"


@dataclass(frozen=True)
class PassState:
    """What a data pass knows after some batches. It is never changed, only replaced.

    So an interruption at any moment finds a state that is whole: that before the batch, or after.

    Attributes:
        sums: of activation statistics, see `Statistics`; with several processes, of this process's
            batches only.
        read: batches and samples of all processes.
        skipped: those that this process left out because they hold NaN or infinity.
        hashes: the chained hash after every batch.
    """

    sums: Mapping[Key, torch.Tensor] = field(default_factory=dict)
    read: Tally = field(default_factory=Tally)
    skipped: Tally = field(default_factory=Tally)
    hashes: tuple[bytes, ...] = ()

    @property
    def batches(self) -> int:
        """Number of batches seen."""
        return len(self.hashes)

    @property
    def half(self) -> int:
        """To which half the next batch belongs: 0 for even, 1 for odd."""
        return self.batches % 2

    @property
    def fingerprint(self) -> bytes:
        """Hash of all batches in their order."""
        return self.hashes[-1] if self.hashes else b""

    @torch.inference_mode(False)  # or a caller in it gets sums that nobody may change
    def after(self, values: Mapping[Key, torch.Tensor], samples: int, digest: bytes) -> PassState:
        """The state after one more batch.

        Args:
            values: float64 `[size]` per statistic and site; empty if another process has it.
            samples: size of the batch.
            digest: chained hash up to this batch.
        """
        half = self.half
        sums = dict(self.sums)
        for key, value in values.items():
            old = sums.get(key)
            new = value.new_zeros(2, len(value)) if old is None else old.clone()
            new[half] += value
            sums[key] = new
        read = self.read.plus(half, samples)
        return PassState(sums, read, self.skipped, (*self.hashes, digest))

    def without(self, samples: int, digest: bytes) -> PassState:
        """The state after a batch that is left out; see `after`."""
        state = self.after({}, samples, digest)
        return replace(state, skipped=self.skipped.plus(self.half, samples))


class Checkpoint:
    """The file of one process of a data pass.

    With several processes each has its own (`name.rank0of2`). The file stays after the pass; the
    caller deletes it when the statistics are safe.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], rank: int, world: int) -> None:
        """Gives the file a place and says what it must belong to.

        Args:
            path: file, without the mark of the process.
            identity: model, method and adapter; what `identity_of` returns.
            rank: index of this process.
            world: number of processes.
        """
        self._base = Path(path)
        self._identity = dict(identity)
        self._world = world
        self.path = self._base.with_name(self._base.name + self._mark(rank))

    def check(self) -> None:
        """Makes sure before the pass that nothing but an earlier checkpoint would be replaced.

        Raises:
            OutputError: if another file, or a link, is there.
        """
        check_own(self.path, lambda path: is_statistics_file(path, "checkpoint"))

    def save(self, state: PassState, large: Mapping[Key, torch.Tensor]) -> None:
        """Writes a state, whole or not at all.

        Args:
            state: what is known after some batches.
            large: sums of loss statistics after the same batches.

        Raises:
            OutputError: if it cannot be written.
        """
        hashes = torch.frombuffer(bytearray(b"".join(state.hashes)), dtype=torch.uint8)
        tensors = pack_sums({**state.sums, **large})
        tensors[_HASHES] = hashes.view(-1, DIGEST_BYTES)
        header = {
            "identity": self._identity,
            "samples": state.read.samples,
            "skipped": [state.skipped.batches, state.skipped.samples],
        }
        write_statistics(self.path, "checkpoint", tensors, header)
        logger.debug("wrote %s after %d batches", self.path, state.batches)

    def load(self) -> tuple[PassState, dict[Key, torch.Tensor]]:
        """Reads the state to resume from and the large sums; empty ones if there is no file.

        Raises:
            StatisticsError: if the file is damaged or of another model, method or number of
                processes.
        """
        if not self.path.exists():
            if others := self._others():
                raise StatisticsError(
                    f"{others[0]} was written by another number of processes; resume with as many "
                    "as before, or delete it and run the pass from the start"
                )
            logger.warning("no checkpoint at %s; starting from the first batch", self.path)
            return PassState(), {}
        tensors, header = read_statistics(self.path, "checkpoint", _REMEDY)
        for key, mine in self._identity.items():
            theirs = header.get("identity", {}).get(key)
            if theirs != mine:
                raise StatisticsError(
                    f"checkpoint {self.path} is of another pass: its {key} is {theirs!r}, this "
                    f"one's is {mine!r}; give the same model and method, or {_REMEDY}"
                )
        try:
            rows = tensors.pop(_HASHES)
            hashes = tuple(bytes(row.tolist()) for row in rows)
            batches = ((len(hashes) + 1) // 2, len(hashes) // 2)
            read = Tally(batches, _pair(header["samples"]))
            skipped = Tally(*map(_pair, header.get("skipped", [(0, 0), (0, 0)])))
            sums = unpack_sums(tensors)
            large = {key: sums.pop(key) for key in list(sums) if key[1].stream == LOSS_STREAM}
            return PassState(sums, read, skipped, hashes), large
        except (KeyError, ValueError, TypeError) as error:
            raise StatisticsError(
                f"{self.path} is damaged ({type(error).__name__}: {error}); {_REMEDY}"
            ) from error

    def _mark(self, rank: int | str) -> str:
        return "" if self._world == 1 else f".rank{rank}of{self._world}"

    def _others(self) -> list[Path]:
        """Checkpoints of the same name that another number of processes wrote."""
        name = glob.escape(self._base.name)
        mine = f"{name}{self._mark('*')}"
        marked = self._base.parent.glob(f"{name}.rank*of*")
        found = sorted(path for path in (self._base, *marked) if path.exists())
        return [path for path in found if not fnmatchcase(path.name, mine)]


def _pair(values: Sequence[Any]) -> tuple[int, int]:
    even, odd = values
    return int(even), int(odd)


def identity_of(
    weights: WeightMap,
    statistics: Sequence[Statistic],
    *,
    published: bool,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """What a pass must have in common with the one that it resumes. Reads every weight once."""
    return {
        "adapter": weights.adapter_name,
        "structure": weights.structure,
        "weights": weights.content_hash(),
        "statistics": sorted({statistic.name for statistic in statistics}),
        "published": published,
        "autocast": None if autocast is None else str(autocast),
    }
