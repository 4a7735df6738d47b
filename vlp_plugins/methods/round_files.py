"""The state of an iterative method after a round, in a file, so that a run can go on from there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.runtime.errors import DataError

logger = logging.getLogger("vlp_plugins.methods")

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
