"""The state of CHITA++ after a stage, in a file, so that a run can go on from there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.runtime.errors import DataError

logger = logging.getLogger("vlp_plugins.methods")

_REMEDY = "delete it and run the method from its first stage"
_FORMAT = Format("checkpoint", "vlp_stages", 1, DataError, _REMEDY)


@dataclass(frozen=True)
class Stage:
    """Where a run stands after a stage.

    Attributes:
        done: number of stages done.
        support: bool `[p]`, what is kept so far.
        values: float32 `[p]`, the weights so far.
        state: what the losses have changed; see `Adapter.loss_state`.
        digests: by round, the hash of its batches, hexadecimal.
        sizes: by round, the number of samples of each of its batches.
        facts: by round, what was found.
    """

    done: int
    support: torch.Tensor
    values: torch.Tensor
    state: list[torch.Tensor]
    digests: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    facts: tuple[dict[str, Any], ...]


class StageFile:
    """The file of one target. Process 0 writes and reads it, the others get what it read."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        """Finds the place of the file.

        Args:
            folder: None keeps no file.
            identity: what a run must have in common with the one it goes on from.
        """
        self._identity = dict(identity)
        text = json.dumps(self._identity, sort_keys=True, default=str)
        mark = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.path = None if folder is None else Path(folder) / f"stages-{mark}.safetensors"

    def save(self, stage: Stage) -> None:
        """Writes a stage over the one before, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        if self.path is None or rank_and_size()[0]:
            return
        tensors = {
            "values": stage.values[stage.support].cpu(),
            "support": stage.support.cpu(),
            **{f"state.{index}": tensor.cpu() for index, tensor in enumerate(stage.state)},
        }
        header = {
            "identity": self._identity,
            "done": stage.done,
            "digests": stage.digests,
            "sizes": stage.sizes,
            "facts": stage.facts,
        }
        write_artifact(self.path, _FORMAT, tensors, header, state=True)

    def load(self, device: torch.device) -> Stage | None:
        """The stage to go on from; None if there is no file.

        Raises:
            DataError: if the file is damaged.
        """
        stage = [self._read() if self.path is not None and not rank_and_size()[0] else None]
        if rank_and_size()[1] > 1:
            distributed.broadcast_object_list(stage)
        found = stage[0]
        if found is None:
            return None
        return Stage(
            found.done,
            found.support.to(device),
            found.values.to(device),
            [tensor.to(device) for tensor in found.state],
            found.digests,
            found.sizes,
            found.facts,
        )

    def _read(self) -> Stage | None:
        assert self.path is not None
        if not self.path.exists():
            logger.warning("no checkpoint at %s; starting from the first stage", self.path)
            return None
        tensors, header = read_artifact(self.path, _FORMAT)
        support = tensors["support"]
        values = torch.zeros(len(support))
        values[support] = tensors["values"]
        states = [name for name in tensors if name.startswith("state.")]
        return Stage(
            int(header["done"]),
            support,
            values,
            [tensors[f"state.{index}"] for index in range(len(states))],
            tuple(header["digests"]),
            tuple(tuple(sizes) for sizes in header["sizes"]),
            tuple(header["facts"]),
        )
