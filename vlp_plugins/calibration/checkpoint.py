"""The state of a data pass, as the file keeps it that a pass is resumed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vlp_plugins.calibration.batches import DIGEST_BYTES
from vlp_plugins.calibration.moments import LOSS_STREAM, Key, LossStatistic, Statistic
from vlp_plugins.calibration.statistics import pack_sums, pair, unpack_sums
from vlp_plugins.calibration.sums import Tally
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import Format
from vlp_plugins.runtime.errors import StatisticsError
from vlp_plugins.runtime.untrusted import read_as

FORM = Format(
    "checkpoint",
    "vlp_checkpoint",
    1,
    StatisticsError,
    "delete it and run the pass from the start",
)
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


def pack_state(
    state: PassState, large: Mapping[Key, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state, and the sums of loss statistics after the same batches, as a file keeps them."""
    hashes = torch.frombuffer(bytearray(b"".join(state.hashes)), dtype=torch.uint8)
    tensors = pack_sums({**state.sums, **large})
    tensors[_HASHES] = hashes.view(-1, DIGEST_BYTES)
    skipped = [state.skipped.batches, state.skipped.samples]
    return tensors, {"samples": state.read.samples, "skipped": skipped}


def unpack_state(
    tensors: dict[str, torch.Tensor], content: Mapping[str, Any]
) -> tuple[PassState, dict[Key, torch.Tensor]]:
    """Inverse of `pack_state`."""
    rows = tensors.pop(_HASHES)
    if rows.dtype != torch.uint8 or rows.shape[1:] != (DIGEST_BYTES,):
        raise ValueError(f"{_HASHES} is {rows.dtype} {list(rows.shape)}")
    hashes = tuple(bytes(row.tolist()) for row in rows)
    batches = ((len(hashes) + 1) // 2, len(hashes) // 2)
    read = Tally(batches, pair(content["samples"]))
    counts = read_as(tuple[Any, Any], content.get("skipped", [(0, 0), (0, 0)]), "skipped")
    skipped = Tally(*map(pair, counts))
    sums = unpack_sums(tensors)
    large = {key: sums.pop(key) for key in list(sums) if key[1].stream == LOSS_STREAM}
    return PassState(sums, read, skipped, hashes), large


def identity_of(
    weights: WeightMap,
    statistics: Sequence[Statistic],
    *,
    published: bool,
    autocast: torch.dtype | None = None,
    halves: bool = True,
) -> dict[str, Any]:
    """What a pass must have in common with the one that it resumes. Reads every weight once."""
    together = not halves and any(isinstance(each, LossStatistic) for each in statistics)
    return {
        **({"sums": "of all batches together"} if together else {}),
        "adapter": weights.adapter_name,
        "structure": weights.structure,
        "weights": weights.content_hash(),
        "statistics": sorted({statistic.name for statistic in statistics}),
        "published": published,
        "autocast": None if autocast is None else str(autocast),
    }
