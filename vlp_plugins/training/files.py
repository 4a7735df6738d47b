"""The state of a training in a file, so that a run can go on from there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.distributed import broadcast, rank_and_size
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.training.loop import Training
from vlp_plugins.training.state import dump, restore

logger = logging.getLogger("vlp_plugins.training")

_FORMAT = Format(
    "checkpoint", "vlp_training", 1, DataError, "delete it and train from the first step"
)
_RISING, _MASTER, _MOMENT, _STATE = "rising|", "master|", "moment|", "state|"


class TrainingFile:
    """The file of one target. Process 0 writes and reads it, the others get what it read."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        """Finds the place of the file.

        Args:
            folder: None keeps no file.
            identity: what a run must have in common with the one it goes on from.
        """
        text = json.dumps(dict(identity), sort_keys=True, default=str)
        mark = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.path = None if folder is None else Path(folder) / f"training-{mark}.safetensors"

    def save(
        self, training: Training, state: Sequence[torch.Tensor], digest: str, sizes: Sequence[int]
    ) -> None:
        """Writes where the training stands over what was there, whole or not at all.

        Args:
            training: after some steps.
            state: what the losses have changed; see `Adapter.loss_state`.
            digest: of the batches so far.
            sizes: their numbers of samples.

        Raises:
            OutputError: if it cannot be written.
        """
        if self.path is None or rank_and_size()[0]:
            return
        tensors = {f"{_RISING}{key}": value for key, value in dump(training.rising).items()}
        for name, master in training.masters.parameters.items():
            tensors[f"{_MASTER}{name}"] = master.detach()
            for key, value in training.optimizer.state.get(master, {}).items():
                tensors[f"{_MOMENT}{key}|{name}"] = value
        tensors |= {f"{_STATE}{index}": tensor for index, tensor in enumerate(state)}
        header = {"digest": digest, "sizes": list(sizes)}
        write_artifact(self.path, _FORMAT, tensors, header, state=True)

    def load(self, training: Training) -> tuple[list[torch.Tensor], str, list[int]] | None:
        """Brings a training to where the file stands.

        Returns:
            State, digest and sizes as they were saved; None if there is no file.

        Raises:
            DataError: if there is no folder to look in, or the file is damaged.
            MaskError: if it is damaged in its masks.
        """
        if self.path is None:
            raise DataError(
                "resume needs the folder that the earlier run kept its checkpoints in; give "
                "workplace"
            )
        found = broadcast(None if rank_and_size()[0] else self._read(self.path))
        if found is None:
            return None
        tensors, header = found
        parts = {
            kind: {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}
            for kind in (_RISING, _MASTER, _MOMENT, _STATE)
        }
        restore(training.rising, parts[_RISING])
        with torch.no_grad():
            for name, master in training.masters.parameters.items():
                master.copy_(parts[_MASTER][name])
        for full, value in parts[_MOMENT].items():
            key, _, name = full.partition("|")
            master = training.masters.parameters[name]
            # AdamW keeps its count of steps on the CPU.
            there = value if key == "step" else value.to(master.device)
            training.optimizer.state[master][key] = there
        training.masters.write()
        state = [parts[_STATE][str(index)] for index in range(len(parts[_STATE]))]
        return state, str(header["digest"]), [int(size) for size in header["sizes"]]

    def _read(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        if not path.exists():
            logger.warning("no checkpoint at %s; starting from the first step", path)
            return None
        return read_artifact(path, _FORMAT)
